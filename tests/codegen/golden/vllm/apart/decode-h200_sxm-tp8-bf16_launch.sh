#!/usr/bin/env bash
# llama-3.1-70b: 8 x h200_sxm: tp 8, bf16 weights, bf16 KV
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
  0:0) node=b gpus=0,1,2,3,4,5,6,7 port=8002 side_port=5728 ;;
  *)
    echo "launch.sh: no instance $instance with node rank $NODE_RANK; instances: 0 to 0" >&2
    exit 2
    ;;
esac

export CUDA_VISIBLE_DEVICES=$gpus
export VLLM_NIXL_SIDE_CHANNEL_HOST=${SIDE_HOST:-$(hostname)}
export VLLM_NIXL_SIDE_CHANNEL_PORT=$side_port

command=(vllm serve "$MODEL" --config "$here/config.yaml" --port "${PORT:-$port}" "$@")
echo "$node: ${command[*]}" >&2
[[ -n ${DRY_RUN:-} ]] || exec "${command[@]}"
