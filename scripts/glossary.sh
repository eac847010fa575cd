#!/usr/bin/env bash
# Checks that the listed files use the terms of GLOSSARY.md and none of the words that it replaces. Files are only added
# to the list in scripts/glossary-files.txt: a listed file must remain clean.
#
# Usage: glossary.sh             checks the listed files
#        glossary.sh FILE…       checks these files, for a look before listing them
#        glossary.sh --update    adds every tracked page and every source file of the product that is clean to the list
set -euo pipefail
cd "$(dirname "$0")/.."

LIST=scripts/glossary-files.txt

# Metaphors and rare words that this project once used where a term exists. Whole words, in any case.
BANNED='acquaintances?|alarms?|away|binding keys?|canary|canaries|doors?|edge|failure budgets?|gates?|goodbye|greets?'
BANNED+='|judge[sd]?|mend(s|ed|ing)?|minders?|nobody|patience|polite(ly)?|prize|strangers?|surroundings|troubles?|whoever'
BANNED+='|is not usable|it is (not )?said|turn(s|ed)? away|in silence'

fail() {
  printf 'glossary: %s\n' "$1" >&2
  exit 1
}

# Prints the text of a file. In a page, text in code style contains names, which may keep old words while the wire and
# stored formats do. Their lines are kept empty, so that line numbers are right.
prose() {
  case $1 in
    *.md) awk '/^ *```/ { code = !code; print ""; next } code { print ""; next } { gsub(/`[^`]*`/, "`"); print }' "$1" ;;
    *) cat "$1" ;;
  esac
}

# Prints each line with a banned word. Succeeds if there is none.
clean() {
  local file found=0
  for file in "$@"; do
    prose "$file" | grep -niwE -- "$BANNED" | sed "s|^|$file:|" && found=1
  done
  return "$found"
}

listed() { grep -vE '^(#|$)' "$LIST"; }

update() {
  local file known
  known=$(listed)
  git ls-files -z '*.md' 'src/*.rs' | while IFS= read -r -d '' file; do
    grep -qxF -- "$file" <<<"$known" && continue
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
