#!/usr/bin/env bash
# llama-3.1-70b: 1 x h200_sxm: tp 1, w4a16 weights, bf16 KV
# Written by planc VERSION from plan PLAN. The settings lie in config.yaml beside this file.
#
# usage: [MODEL=weights] [PORT=n] [DRY_RUN=1] launch.sh [instance] [option of vllm serve ...]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

: "${MODEL:?set MODEL to the folder (or hub name) with the weights}"

# The plan has w4a16 weights and the published checkpoint has bf16: vLLM cannot make the
# one from the other while loading, so MODEL must be a checkpoint that is already in that format.
if [[ -z ${ANY_WEIGHTS:-} ]] && ! grep -qs '"quantization_config"' "$MODEL/config.json"; then
  echo "launch.sh: '$MODEL' is not a quantized checkpoint, and the plan needs w4a16 weights." >&2
  echo "Write one: planc export BUNDLE --engine vllm --weights WEIGHTS -o OUT; then MODEL=OUT" >&2
  echo "(ANY_WEIGHTS=1 skips this question.)" >&2
  exit 2
fi

instance=0
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  instance=$1
  shift
fi
NODE_RANK=${NODE_RANK:-0}
case $instance:$NODE_RANK in
  0:0) node=node0 gpus=0 port=8000 ;;
  *)
    echo "launch.sh: no instance $instance with node rank $NODE_RANK; instances: 0 to 0" >&2
    exit 2
    ;;
esac

export CUDA_VISIBLE_DEVICES=$gpus

command=(vllm serve "$MODEL" --config "$here/config.yaml" --port "${PORT:-$port}" "$@")
echo "$node: ${command[*]}" >&2
[[ -n ${DRY_RUN:-} ]] || exec "${command[@]}"
