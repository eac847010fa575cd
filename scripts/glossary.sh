#!/usr/bin/env bash
# Checks that the listed files use the terms of GLOSSARY.md and none of the words it replaces. The list in
# scripts/glossary-files.txt only grows: a file on it has to stay clean.
#
# Usage: glossary.sh             checks the listed files
#        glossary.sh FILE…       checks these files, for a look before listing them
#        glossary.sh --update    adds every tracked page (*.md) that is clean to the list
set -euo pipefail
cd "$(dirname "$0")/.."

LIST=scripts/glossary-files.txt

# Metaphors and rare words that this project once used where a term exists. Whole words, in any case.
BANNED='acquaintances?|alarms?|away|canary|canaries|doors?|edge|gates?|goodbye|greets?|judge[sd]?|mend(s|ed|ing)?|minders?'
BANNED+='|nobody|patience|polite(ly)?|strangers?|surroundings|whoever'
BANNED+='|it is (not )?said|turn(s|ed)? away|in silence'

fail() {
  printf 'glossary: %s\n' "$1" >&2
  exit 1
}

# Prints each line with a banned word; succeeds when there is none.
clean() { ! grep -nHiwE -- "$BANNED" "$@"; }

listed() { grep -vE '^(#|$)' "$LIST"; }

update() {
  local file
  git ls-files -z '*.md' | while IFS= read -r -d '' file; do
    listed | grep -qxF -- "$file" && continue
    clean "$file" >/dev/null && printf '%s\n' "$file"
  done >>"$LIST"
}

main() {
  [[ ${1:-} == --update ]] && { update; return; }
  local file files=("$@")
  [[ ${#files[@]} -gt 0 ]] || mapfile -t files < <(listed)
  [[ ${#files[@]} -gt 0 ]] || fail "$LIST lists no file"
  for file in "${files[@]}"; do
    [[ -s $file ]] || fail "$file is listed in $LIST and does not exist"
  done
  clean "${files[@]}" || fail 'these lines use words that GLOSSARY.md replaces'
  printf 'glossary: %s files are clean\n' "${#files[@]}"
}

main "$@"
