# Ends the processes that a script started. The process id of the broker is in BROKER_PID, which is empty without a broker.
# shellcheck shell=bash

# Stops the broker. The result is that of the broker.
stop_broker() {
  [[ -n $BROKER_PID ]] || return 0
  kill -TERM "$BROKER_PID" 2>/dev/null || true
  local status=0
  wait "$BROKER_PID" || status=$?
  BROKER_PID=
  return "$status"
}

# Ends a process that this script started. An empty argument is no process.
stop() {
  [[ -n $1 ]] || return 0
  kill -TERM "$1" 2>/dev/null || true
  wait "$1" 2>/dev/null || true
}
