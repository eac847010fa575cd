#!/usr/bin/env bash
# Prints 40 sentences for a reader's assessment, ten each of pages, help texts, messages and comments, with their files.
# The hash of the commit selects them. The same commit therefore gives the same sentences, and no person selects the clear
# ones.
#
# Usage: sample-prose.sh [COMMIT]      default: HEAD; the text is that of the work tree
set -euo pipefail
cd "$(dirname "$0")/.."

EACH=10
WORDS_MIN=5

fail() {
  printf 'sample-prose: %s\n' "$1" >&2
  exit 1
}

# Splits the paragraphs of files into sentences. Each line has the file's name and one sentence. `kind` selects the text: a
# page without its code and tables, the comments of a source file, or the doc comments that clap shows. The latter belong
# to fields and variants of a type that derives a trait of clap. Test modules in a source file are left out.
sentences() {
  awk -v kind="$1" -v words_min="$WORDS_MIN" '
    function flush(   count, part, i, text, rest) {
      gsub(/[ \t]+/, " ", paragraph)
      count = 0
      rest = paragraph
      while (match(rest, /[.?!] +[A-Z`]/)) {
        part[++count] = substr(rest, 1, RSTART)
        rest = substr(rest, RSTART + RLENGTH - 1)
      }
      part[++count] = rest
      for (i = 1; i <= count; i++) {
        text = part[i]
        sub(/^ +/, "", text); sub(/ +$/, "", text)
        if (split(text, unused, " ") >= words_min) print file ": " text
      }
      paragraph = ""
    }
    FNR == 1 { flush(); file = FILENAME; code = in_tests = after_cfg = clap = 0 }
    kind != "page" && after_cfg { after_cfg = 0; if (/\{$/) in_tests = 1; next }
    kind != "page" && in_tests { if (/^}/) in_tests = 0; next }
    kind != "page" && /^#\[cfg\(test\)\]/ { flush(); after_cfg = 1; next }
    kind == "help" && /^#\[derive\(.*(Args|Subcommand|Parser|ValueEnum)/ { clap = 1; next }
    kind == "help" && /^}/ { clap = 0 }
    kind == "help" && /#\[(arg\(skip|command\(flatten)/ { paragraph = "" }
    kind == "help" && !clap { paragraph = ""; next }
    kind == "page" && /^ *```/ { flush(); code = !code; next }
    kind == "page" && (code || /^\|/ || /^#/ || (/^    / && paragraph == "") || /^ *$/) { flush(); next }
    kind == "page" { line = $0; if (line ~ /^ *([-*]|[0-9]+\.) /) { flush(); sub(/^ *([-*]|[0-9]+\.) /, "", line) } }
    kind == "help" && !/^ *\/\/\/( |$)/ { flush(); next }
    kind != "page" { line = $0; sub(/^ *\/\/[\/!]? ?/, "", line) }
    kind == "comment" && line ~ /^ *```/ { flush(); code = !code; next }
    kind == "comment" && code && /^ *\/\// { next }
    kind == "comment" && !/^ *\/\/[\/!]?( |$)/ { flush(); next }
    kind != "page" && line == "" { flush(); next }
    { paragraph = paragraph " " line }
    END { flush() }' "${@:2}"
}

product() { git ls-files 'src/*.rs' | grep -vE '(^|/)(tests?|generated|benches)(/|\.rs$|_)'; }

pages() { git ls-files -z '*.md' | xargs -0 grep -lZ . | xargs -0 bash -c 'sentences page "$@"' sentences; }

help_texts() { product | xargs grep -lE 'derive\(.*(Args|Subcommand|Parser|ValueEnum)' | xargs bash -c 'sentences help "$@"' sentences; }

comments() { product | xargs bash -c 'sentences comment "$@"' sentences; }

# Prints string literals of five words or more. Comments, test modules, constants, SQL, the texts of `expect` and the
# reasons of lints are left out. A literal on several lines is joined.
messages() {
  # shellcheck disable=SC2016  # The program is for awk.
  product | xargs awk '
    FNR == 1 { in_tests = after_cfg = 0; before = joined = "" }
    after_cfg { after_cfg = 0; if (/\{$/) in_tests = 1; next }
    in_tests { if (/^}/) in_tests = 0; next }
    /^#\[cfg\(test\)\]/ { after_cfg = 1; next }
    /^ *\/\// { next }
    { line = joined $0 }
    joined != "" { sub(/^ */, "", $0); line = joined $0 }
    /[^\\]\\$/ { joined = substr(line, 1, length(line) - 1); next }
    {
      joined = ""
      if (line !~ /expect(_err)?\(|reason = |(const|static) |SELECT|INSERT|UPDATE|DELETE|CREATE|FROM|WHERE/ && before !~ /(expect(_err)?\(|(const|static) .*=)$/) {
        rest = line
        while (match(rest, /"([^"\\]|\\.)*"/)) {
          text = substr(rest, RSTART, RLENGTH)
          rest = substr(rest, RSTART + RLENGTH)
          if (split(text, unused, " ") >= 5) print FILENAME ": " text
        }
      }
      before = line
    }'
}

chosen() {
  local kind=$1 list
  list=$("$kind" | sort -u)
  (($(wc -l <<<"$list") >= EACH)) || fail "there are fewer than $EACH $kind"
  printf '== %s\n' "${kind//_/ }"
  shuf --head-count "$EACH" --random-source=<(noise "$kind") <<<"$list"
}

# Prints endless bytes that depend on the commit.
noise() { openssl enc -aes-256-ctr -pbkdf2 -nosalt -pass "pass:$COMMIT $1" </dev/zero 2>/dev/null; }

export -f sentences
export WORDS_MIN
COMMIT=$(git rev-parse --verify --quiet "${1:-HEAD}^{commit}") || fail "there is no commit $1"
printf 'sentences of commit %s\n' "$COMMIT"
for kind in pages help_texts messages comments; do chosen "$kind"; done
