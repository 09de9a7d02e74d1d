#!/usr/bin/env bash
# Compiles every example request into out/examples, runs what runs on any machine, and diffs two plans.
set -euo pipefail
cd "$(dirname "$0")/.."
planc="${BIN:-.venv/bin}/planc"
out=out/examples
mkdir -p "$out"
show() { printf '\n$ planc %s\n' "$*"; "$planc" "$@"; }

"${BIN:-.venv/bin}/python" examples/tiny_model.py out/tiny-llama
for request in examples/requests/*.yaml; do
  show compile "$request" -o "$out/$(basename "$request" .yaml)"
done

# two plans of one model: less traffic, and what it changes
show compile examples/requests/llama-3.1-70b-8xh200.yaml --set workload.request_rate=3 -o "$out/llama-70b-less"
show diff "$out/llama-3.1-70b-8xh200" "$out/llama-70b-less" || [ $? -eq 1 ]

# a plan under recorded traffic, and another configuration of the same request beside it
show replay "$out/qwen3-8b-l40s" --trace examples/traces/chat.jsonl --router prefix_aware
show replay examples/requests/qwen3-8b-l40s.yaml --trace examples/traces/chat.jsonl --set replicas=3 --set prefill_replicas=1

# a module of one's own, from Python
printf '\n$ python examples/own_module.py\n'
"${BIN:-.venv/bin}/python" examples/own_module.py
