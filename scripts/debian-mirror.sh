# shellcheck shell=bash
# A function for other scripts that fetch Debian packages.

# Prints the mirror of Debian 12 from the package sources of this machine. The scripts that create a small Debian
# system use this mirror, so that they work wherever apt works, and contact no other host.
debian_mirror() {
  local mirror
  # shellcheck disable=SC2016  # apt-get replaces it.
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Codename: bookworm' | head -n 1)
  [[ -n $mirror ]] || fail 'the package sources of this machine name no mirror of Debian 12 (bookworm)
hint: run apt-get update; if it is another release, run this script on Debian 12'
  printf '%s\n' "${mirror%/}"
}
