#!/usr/bin/env bash
# llama-3.1-70b: 2 x cpu: tp 2, bf16 weights, bf16 KV
# Written by planc VERSION from plan PLAN. The settings lie in config.yaml beside this file.
#
# usage: [MODEL=weights] [PORT=n] [DRY_RUN=1] launch.sh [instance] [option of vllm serve ...]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

: "${MODEL:?set MODEL to the folder (or hub name) with the weights}"

instance=0
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  instance=$1
  shift
fi
NODE_RANK=${NODE_RANK:-0}
case $instance:$NODE_RANK in
  0:0) node=node0 gpus=0,1 port=8000 ;;
  *)
    echo "launch.sh: no instance $instance with node rank $NODE_RANK; instances: 0 to 0" >&2
    exit 2
    ;;
esac

export VLLM_CPU_KVCACHE_SPACE=1
export VLLM_CPU_OMP_THREADS_BIND=nobind
threads=$(($(nproc) / 2))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

command=(vllm serve "$MODEL" --config "$here/config.yaml" --port "${PORT:-$port}" "$@")
echo "$node: ${command[*]}" >&2
[[ -n ${DRY_RUN:-} ]] || exec "${command[@]}"
