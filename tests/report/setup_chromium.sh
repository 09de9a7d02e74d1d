#!/usr/bin/env bash
# Prints the path of a Chromium; installs the distribution's where there is none and we may (Debian, root).
set -euo pipefail
find_one() {
  for name in "${PLANC_CHROMIUM:-}" chromium chromium-browser google-chrome google-chrome-stable; do
    if [[ -n $name ]] && command -v "$name"; then return 0; fi
  done
  return 1
}
find_one && exit 0
if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
  echo "installing chromium from the distribution" >&2
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } >&2
  find_one && exit 0
fi
echo "no Chromium: install one (Debian: apt-get install chromium) or name it in PLANC_CHROMIUM" >&2
exit 4
