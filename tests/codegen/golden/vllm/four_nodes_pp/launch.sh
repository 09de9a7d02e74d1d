#!/usr/bin/env bash
# deepseek-r1: 32 x h200_sxm: tp 8, pp 4, bf16 weights, bf16 KV
# Written by planc VERSION from plan PLAN. The settings lie in config.yaml beside this file.
#
# usage: [MODEL=weights] [PORT=n] [DRY_RUN=1] launch.sh [instance] [option of vllm serve ...]
#        with HEAD_ADDR=<address of the first node> and NODE_RANK=0, 1, ... on each node of an instance
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
  0:0) node=n0 gpus=0,1,2,3,4,5,6,7 port=8000 ;;
  0:1) node=n1 gpus=0,1,2,3,4,5,6,7 port=8000 ;;
  0:2) node=n2 gpus=0,1,2,3,4,5,6,7 port=8000 ;;
  0:3) node=n3 gpus=0,1,2,3,4,5,6,7 port=8000 ;;
  *)
    echo "launch.sh: no instance $instance with node rank $NODE_RANK; instances: 0 to 0" >&2
    exit 2
    ;;
esac

export VLLM_PP_LAYER_PARTITION=16,15,15,15
export CUDA_VISIBLE_DEVICES=$gpus

: "${HEAD_ADDR:?set HEAD_ADDR to the address of the first node of the instance}"
nodes=(--nnodes 4 --node-rank "$NODE_RANK" --master-addr "$HEAD_ADDR" --master-port $((port + 5000)))
((NODE_RANK == 0)) || nodes+=(--headless)

command=(vllm serve "$MODEL" --config "$here/config.yaml" --port "${PORT:-$port}" "${nodes[@]}" "$@")
echo "$node: ${command[*]}" >&2
[[ -n ${DRY_RUN:-} ]] || exec "${command[@]}"
