# shellcheck shell=bash
# For other scripts: where to fetch Debian packages from.

# Prints the mirror of Debian 12 that the package sources of this machine name. The scripts that make a small Debian
# system use it, so that they work wherever apt works, and reach no other host.
debian_mirror() {
  local mirror
  # shellcheck disable=SC2016  # apt-get replaces it.
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Codename: bookworm' | head -n 1)
  [[ -n $mirror ]] || fail 'the package sources of this machine name no mirror of Debian 12 (bookworm)
hint: run apt-get update; if it is another release, run this script on Debian 12'
  printf '%s\n' "${mirror%/}"
}
