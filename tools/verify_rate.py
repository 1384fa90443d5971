"""Times ``ownpath verify``: seconds of each stage for a layer, on a synthetic checkpoint of full-size V4-Flash layers.

    PYTHONPATH=src python tools/verify_rate.py --folder /tmp/synthetic --layers 4 --device cuda --out rates.jsonl

The folder is written if it is not there (2.1 GB, and 3.8 GB a layer) and kept. Its matrices have random bits and its
tokenizer is none, so that the file stage is left out. A row for each stage: seconds, findings by verdict, the largest
memory on the device. Exit code: 1 if anything failed.
"""

import argparse
import shlex
import sys
from collections import Counter
from pathlib import Path

import torch
from layer.shards import write_shards

from ownpath.bench.published import SHAPES
from ownpath.bench.record import append_lines, provenance
from ownpath.config import EngineConfig
from ownpath.finding import failed
from ownpath.verify.run import STAGES, StageResult, VerifyJob, verify
from ownpath.verify.subject import Selection


def main() -> int:
    """Runs stage after stage and appends a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the synthetic checkpoint lies, or will lie")
    parser.add_argument("--layers", type=int, default=4, help="of the checkpoint that is written: 2 sliding, CSA, HCA")
    parser.add_argument("--shape", choices=list(SHAPES), default="flash")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--stages", default=",".join(name for name in STAGES if name != "file"))
    parser.add_argument("--experts", type=int, help="a sample of each layer's; default: all")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    if not args.folder.exists():
        write_shards(args.folder, args.shape, args.layers)
    origin = provenance(args.device, args.commit, shlex.join(sys.argv), "time.perf_counter")
    all_passed = True
    for name in args.stages.split(","):
        if args.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        job = VerifyJob(args.folder, EngineConfig.for_device(args.device), Selection(num_experts=args.experts))
        (result,) = verify(job, [name]).stages
        row = row_of(result, job, args.device)
        append_lines(args.out, [{"bench": "verify", "shape": args.shape} | row | origin])
        print(f"{name:12} {row['seconds_per_layer']:8.2f} s a layer  {row['verdicts']}  {row['peak_device_bytes']} B")
        for finding in failed(result.findings)[:8]:
            print(f"    FAIL {finding.id} {finding.where} [{finding.kernel}]: {finding.message}")
        all_passed &= not failed(result.findings) and not result.skipped
    return 0 if all_passed else 1


def row_of(result: StageResult, job: VerifyJob, device: str) -> dict[str, object]:
    """Returns a stage's row; its time is divided by the number of layers, the model's two ends included."""
    num_layers = len(job.subject.layer_ids)
    return {
        "stage": result.name,
        "layers": num_layers,
        "experts": job.selection.num_experts or job.subject.config.n_routed_experts,
        "seconds": round(result.seconds, 3),
        "seconds_per_layer": round(result.seconds / num_layers, 3),
        "verdicts": dict(Counter(finding.verdict.value for finding in result.findings)),
        "peak_device_bytes": torch.cuda.max_memory_allocated() if device != "cpu" else None,
        "skipped": result.skipped,
    }


if __name__ == "__main__":
    sys.exit(main())
