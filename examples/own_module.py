"""A module of one's own, compiled from Python: a convolutional classifier on one L4.

python examples/own_module.py
"""

from pathlib import Path

import planc
from planc.planner.request import make_request


def main() -> None:
    request = make_request(
        {
            "model": "examples.modules.convnet:resnet50",
            "inventory": {"nodes": [{"gpu": "l4", "gpus_per_node": 1, "count": 1}]},
            "workload": {"isl": 1, "osl": 0, "request_rate": 500},  # images a second
            "slo": {"e2e_mean_ms": 50},
        }
    )
    plan = planc.compile(request)
    replica = plan.replicas()[0]
    print(f"{plan.model.name}: {plan.model.parameters / 1e6:.1f} M parameters on {replica.gpu}")
    print(f"batches of up to {replica.max_num_seqs}, {plan.predicted['e2e_ms'].value:.2f} ms each")
    plan.save(Path("out/examples/own-module"))


if __name__ == "__main__":
    main()
