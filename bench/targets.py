"""What the project promises of itself, and whether a run met it."""

from __future__ import annotations

from dataclasses import dataclass

from .contenders import Measurement


@dataclass(frozen=True)
class Verdict:
    """A promise, what was measured, and whether that is enough."""

    promise: str
    measured: float
    bound: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        return f"{self.promise} | {self.measured:.2f} | {sign} {self.bound:g} | {'met' if self.met else '**missed**'}"


# (loss, shape, dtype): least speed-up over torch, over torch.compile; on a CPU
SPEED = {
    ("CrossEntropyLoss", "2048x32000", "float32"): (4.0, 2.3),
    ("CrossEntropyLoss", "2048x32000", "bfloat16"): (3.0, None),
    ("CrossEntropyLoss", "8x21x512x512", "float32"): (3.0, None),
    ("MSELoss", "4096x8192", "float32"): (2.0, 1.0),
    ("BCEWithLogitsLoss", "4096x8192", "float32"): (4.0, 1.0),
    ("SigmoidFocalLoss", "4096x8192", "float32"): (4.0, 1.0),
}


def verdicts(measurements: list[Measurement], import_overhead: float | None, device: str) -> list[Verdict]:
    of_one = of_measurement if device == "cpu" else of_measurement_on_gpu
    found = [verdict for m in measurements for verdict in of_one(m)]
    if import_overhead is not None:
        found.append(Verdict("import beyond torch's, ms", import_overhead * 1e3, 60, at_least=False))
    return found


def of_measurement(m: Measurement) -> list[Verdict]:
    label, times = f"{m.loss} {m.shape} {m.dtype}", m.forward_backward
    ours = times["ours"].median
    if not m.traffic:
        return of_head(label, m)
    found = []
    over_torch, over_compile = SPEED.get((m.loss, m.shape, m.dtype), (None, None))
    if m.shape == "4096x8192" and m.dtype == "float32":
        over_compile = 1.0
    if over_torch:
        found.append(Verdict(f"{label}: torch ÷ ours", times["torch"].median / ours, over_torch))
    if over_compile and "compile" in times:
        found.append(Verdict(f"{label}: torch.compile ÷ ours", times["compile"].median / ours, over_compile))
    if "in place" in times and m.dtype == "float32" and m.shape == "2048x32000":
        found.append(Verdict(f"{label}: in place ÷ copy", times["in place"].median / m.bound.median, 1.8, False))
    if m.bytes <= 8192:
        found.append(Verdict(f"{label}: ours ÷ torch", ours / times["torch"].median, 1.25, False))
    else:
        # Statistics are two numbers a row; 10% covers them for the shapes that are measured.
        found.append(Verdict(f"{label}: extra memory ÷ gradient", m.peak["ours"] / m.bytes, 1.1, False))
    return found


# Of a head on a GPU: least speed-up over libraries.
OVER_LIBRARIES = {"liger": 1.5, "cce": 1.0, "quack": 1.0, "torch": 1.0}


def of_measurement_on_gpu(m: Measurement) -> list[Verdict]:
    """Only large shapes show the kernels; and those of heads are measured beside other libraries."""
    label, times = f"{m.loss} {m.shape} {m.dtype}", m.forward_backward
    ours = times["ours"].median
    if m.loss == "linear_cross_entropy" and m.shape.startswith("8192x4096x128256"):
        found = [Verdict(f"{label}: ours ÷ its products", ours / m.bound.median, 1.1, False)]
        return found + [
            Verdict(f"{label}: {name} ÷ ours", times[name].median / ours, bound)
            for name, bound in OVER_LIBRARIES.items()
            if name in times
        ]
    if m.traffic and m.bytes > 2**30 and "compile" in times:
        return [Verdict(f"{label}: torch.compile ÷ ours", times["compile"].median / ours, 1.0)]
    return []


# Of a head: how many times its products, forward and backward may take.
OVER_PRODUCTS = {"linear_cross_entropy": 1.05, "linear_log_probs": 1.1}
WORKSPACE_MIB = 64


def of_head(label: str, m: Measurement) -> list[Verdict]:
    times, ours = m.forward_backward, m.forward_backward["ours"].median
    if m.loss == "linear_jsd":
        return [Verdict(f"{label}: torch ÷ ours", times["torch"].median / ours, 2.0)]
    found = [Verdict(f"{label}: ours ÷ its products", ours / m.bound.median, OVER_PRODUCTS[m.loss], False)]
    if m.loss == "linear_cross_entropy":
        found.append(Verdict(f"{label}: torch ÷ ours", times["torch"].median / ours, 1.25))
        if "torch chunked" in times:
            found.append(Verdict(f"{label}: torch's chunks ÷ ours", times["torch chunked"].median / ours, 2.0))
        extra = (m.peak["ours"] - m.bytes) / 2**20
        found.append(Verdict(f"{label}: MiB beyond the gradients", extra, WORKSPACE_MIB, False))
    return found
