"""The checks and measurements of `make gpu-check` that run kernels:

    python -m benchmarks.gpu_kernels STEP ... --json OUT [--emulated] [--case NAME ...]

touch      every op, both directions, all float types, odd widths: what compute-sanitizer watches
streams    many streams at a time give what one gives
graphs     a captured CUDA graph, replayed on new inputs, gives what a call gives
large      tables, bases and outputs past 2^31 elements
benchmark  time and bytes/s of every op beside a copy, its eager and compiled twins and PyTorch's own op

--rivals names what `benchmark` compares with; twins that loop over clients, and compiling, take most of its
time. With --emulated the CUDA kernels run on the CPU (csrc/emulator), on tiny shapes: the script is tried,
nothing is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_cases import CASES, CHECKS, LARGE, SMALL, Case, Draw, Sizes
from fedpeft_ext import ops, reference

ROOT = Path(__file__).resolve().parent.parent
TINY = CHECKS[0]
RIVALS = ("eager", "native", "compiled")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16}


def run(case: Case, namespace: Any) -> list[Tensor]:
    """The outputs, or the new state of an op in place, whose state is then put back."""
    before = [t.detach().clone() for t in case.state]
    with torch.no_grad():
        out = case.call(namespace)
        outputs = [*case.state] if case.state else list(out) if isinstance(out, tuple) else [out]
        outputs = [t.detach().clone() for t in outputs]
        for t, old in zip(case.state, before, strict=True):
            t.copy_(old)
    return outputs


def run_backward(case: Case, namespace: Any) -> list[Tensor]:
    if not case.leaves:
        return []
    out = case.call(namespace)
    cotangent = torch.linspace(-1, 1, out.numel(), device=out.device).to(out.dtype).reshape(out.shape)
    return list(torch.autograd.grad(out, case.leaves, cotangent))


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True)
    )


def share_of(mask: Tensor) -> float:
    """1 if and only if all are true: the mean of ones may be less, since a GPU multiplies by 1 / n."""
    return int(mask.sum()) / mask.numel() if mask.numel() else 1.0


def compare(name: str, case: Case) -> None:
    """Ours against the twin, on the same numbers."""
    for what, function in (("output", run), ("gradient", run_backward)):
        for i, (ours, twin) in enumerate(zip(function(case, ops), function(case, reference), strict=True)):
            if ours.is_floating_point():
                if not twin.numel():
                    continue
                scale, off = float(twin.abs().max()), (ours.double() - twin.double()).abs()
                tolerance = max(case.tolerance, 4 * torch.finfo(ours.dtype).eps)
                share = share_of(off <= tolerance * max(scale, 1.0))
                if share < case.agreement or not bool(off.isfinite().all()):
                    raise AssertionError(
                        f"{name}: {what} {i} is {float(off.max()):.3g} off its twin of size {scale:.3g}, "
                        f"and more than {tolerance:.0e} of that at {1 - share:.2%}"
                    )
            else:
                share = share_of(ours == twin)
                if share < case.agreement:
                    raise AssertionError(f"{name}: {share:.2%} of {what} {i} equal the twin's")


class Failures:
    """Of a step's cases, of which one that fails does not stop the others, unless the device is lost."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.found: list[str] = []
        self.lost = False

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        try:
            yield
            self.wait()
        except Exception as error:
            traceback.print_exc()
            text = str(error)
            self.found.append(text if text.startswith(name) else f"{name}: {type(error).__name__}: {text}")
            try:
                self.wait()
            except Exception:  # as after a device-side assertion
                self.lost = True

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def end(self) -> None:
        if self.lost:
            self.found.append("the device is lost: what came behind was not run")
        if self.found:
            raise AssertionError("\n".join(self.found))


def chosen(names: list[str]) -> dict[str, Callable[[Sizes, Draw], Case]]:
    return {name: CASES[name] for name in names}


def touch(
    device: torch.device, names: list[str], emulated: bool, dtypes: Sequence[str] = ("float32",)
) -> dict[str, Any]:
    sizes = CHECKS[:1] if emulated else CHECKS
    count, failures = 0, Failures(device)
    for name, make in chosen(names).items():
        for s in sizes:
            for dtype in dtypes:
                if failures.lost:
                    break
                with failures.of(f"{name}, {dtype}, {s}"):
                    case = make(s, Draw(device, DTYPES[dtype]))
                    run(case, ops)
                    run_backward(case, ops)
                    count += 1
    failures.end()
    return {"calls": count}


def streams(device: torch.device, names: list[str], emulated: bool) -> dict[str, Any]:
    """Every case on a stream of its own, all at once."""
    sizes, failures = TINY if emulated else SMALL, Failures(device)
    cases, expected = {}, {}
    for name, make in chosen(names).items():
        with failures.of(name):
            case = make(sizes, Draw(device))
            expected[name] = (run(case, ops), run_backward(case, ops))
            cases[name] = case
    got: dict[str, list[tuple[list[Tensor], list[Tensor]]]] = {}
    for name, case in cases.items():
        with contextlib.nullcontext() if emulated else torch.cuda.stream(torch.cuda.Stream()):
            got[name] = [(run(case, ops), run_backward(case, ops)) for _ in range(1 if emulated else 20)]
    failures.wait()
    for name, results in got.items():
        with failures.of(name):
            for forward, backward in results:
                if not (equal(forward, expected[name][0]) and equal(backward, expected[name][1])):
                    raise AssertionError(f"{name}: differs when other streams work too")
    failures.end()
    return {"streams": len(cases)}


def graphs(device: torch.device, names: list[str], emulated: bool) -> dict[str, Any]:
    """Captures forward and backward of every case, gives its inputs new numbers, replays, and calls."""
    captured, refused = [], {}
    failures = Failures(device)
    cases = {name: make(TINY if emulated else SMALL, Draw(device)) for name, make in chosen(names).items()}
    # A capture that fails upsets those after it, and the generator for good.
    ordered = sorted(cases.items(), key=lambda item: bool(item[1].capturable))
    numbers = {name: [torch.randn_like(t) for t in case.inputs] for name, case in ordered}

    def check(name: str, case: Case) -> None:
        fresh = numbers[name]

        def work(case: Case = case) -> list[Tensor]:
            with torch.no_grad():
                out = case.call(ops)
            outputs = [] if out is None else list(out) if isinstance(out, tuple) else [out]
            return [*outputs, *run_backward(case, ops)]

        state = [t.clone() for t in case.state]

        def restore(case: Case = case, fresh: list[Tensor] = fresh, state: list[Tensor] = state) -> None:
            with torch.no_grad():
                for t, new in zip((*case.inputs, *case.state), (*fresh, *state), strict=True):
                    t.copy_(new)

        if emulated:
            outputs = work()

            def replay(outputs: list[Tensor] = outputs, work: Callable[[], list[Tensor]] = work) -> None:
                for old, new in zip(outputs, work(), strict=True):
                    old.copy_(new)
        else:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # warm up: the first call sets things up
                work()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    outputs = work()
            except RuntimeError as error:
                if not case.capturable:
                    raise AssertionError(f"{name}: cannot be captured in a CUDA graph: {error}") from error
                refused[name] = case.capturable
                torch.cuda.synchronize()
                return
            if case.capturable:
                raise AssertionError(f"{name}: was captured, but cannot be: {case.capturable}")
            replay = graph.replay  # type: ignore[assignment]
        restore()
        replay()
        got = [t.clone() for t in (*outputs, *case.state)]
        restore()
        expected = [*work(), *(t.clone() for t in case.state)]
        if not equal(got, expected):
            raise AssertionError(f"{name}: a replayed graph differs from a call")
        captured.append(name)

    for name, case in ordered:
        if failures.lost:
            break
        with failures.of(name):
            check(name, case)
    failures.end()
    return {"captured": captured, "not_capturable": refused}


def large(device: torch.device, names: list[str], emulated: bool) -> dict[str, Any]:
    """Rows beyond element 2^31 of tables and outputs are read and written where they are."""
    D = 64
    rows = 1 << 10 if emulated else (1 << 31) // D + 1000
    if not emulated and torch.cuda.mem_get_info()[0] < 24 << 30:
        return {"note": f"skipped: {torch.cuda.mem_get_info()[0] / 2**30:.0f} GiB are free, it takes 24"}

    def require(good: bool, what: str) -> None:
        if not good:
            raise AssertionError(f"{what}: wrong past element 2^31")

    table = torch.zeros(rows, D, dtype=torch.float16, device=device)
    last = torch.arange(rows - 100, rows, device=device)
    table[last] = torch.randn(100, D, device=device).half()
    require(torch.equal(ops.client_embedding(last, table), table[last]), "client_embedding, table")
    codes = torch.zeros(rows, 2, dtype=torch.uint8, device=device)
    zeros = torch.zeros(2, 1, D, dtype=torch.float16, device=device)
    require(torch.equal(ops.rq_lookup(last, codes, zeros, table), table[last]), "rq_lookup, base")
    hashes = ops.make_hashes(2, seed=0).to(device)
    require(
        torch.equal(ops.hash_lookup(last, zeros[0], hashes, base=table), table[last]), "hash_lookup, base"
    )
    factors = torch.zeros(rows, 1, dtype=torch.float16, device=device)
    B = torch.zeros(D, 1, dtype=torch.float16, device=device)
    require(torch.equal(ops.lora_lookup(last, factors, B, table), table[last]), "lora_lookup, base")
    grad = torch.ones(100, D, dtype=torch.float16, device=device)
    table.requires_grad_()
    (got,) = torch.autograd.grad(ops.client_embedding(last, table), table, grad)
    require(
        bool((got[last] == 1).all()) and int(got.count_nonzero()) == 100 * D, "client_embedding, gradient"
    )
    del got, table, codes, factors
    items = torch.zeros(rows, dtype=torch.int32, device=device)
    items[last] = torch.arange(100, dtype=torch.int32, device=device)
    small = torch.randn(100, D, device=device).half()
    require(torch.equal(ops.client_embedding(items, small)[last], small), "client_embedding, output")
    del items
    # A step of SGD on items whose vectors lie there; nearly all negatives have vectors of zero.
    base = torch.zeros(rows, D, device=device)
    base[last] = torch.randn(100, D, device=device)
    client, indptr = last.new_zeros(1), torch.tensor([0, 100], device=device)
    user = torch.randn(1, D, device=device)
    trained = ops.local_train(
        *(client, indptr, last, last, rows, user, ops.ItemParts(base=base)),
        epochs=1,
        optimizer="sgd",
        lr=1.0,
        seed=1,
        round=2,
    )
    negatives = ops.sample_negatives(last[None], client, indptr, last, rows, 1, seed=1, round=2)[0, 0]
    difference = base[last] - base[negatives]
    expected = user[0] + (torch.sigmoid(-(difference @ user[0]))[:, None] * difference).mean(0)
    require(torch.allclose(trained.user[0], expected, atol=1e-4), "local_train, base")
    return {"elements": rows * D}


def seconds(call: Callable[[], Any], device: torch.device, budget: float, queued: bool = True) -> float:
    """Time of a call: the median of batches. With `queued`, on the device alone: the calls of a batch stand
    in the stream's queue before the first of them starts (but those that wait for the device)."""
    host = 0.0  # seconds of a call, to be made

    def timed(calls: int) -> float:
        nonlocal host
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin = time.perf_counter()
            if queued:  # the device is kept busy: cycles, of about 2 GHz
                torch.cuda._sleep(int(2e9 * min(1.5 * host * calls, 0.1)))
            start.record()
            for _ in range(calls):
                call()
            stop.record()
            host = (time.perf_counter() - begin) / calls
            stop.synchronize()
            return float(start.elapsed_time(stop)) / 1e3 / calls
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - begin) / calls

    first = timed(1)
    if first > 20 * budget > 0:  # a twin that loops: its start is a small part
        return first
    once = timed(1)
    calls = max(1, min(100, int(budget / 5 / max(once, 1e-6))))
    return statistics.median(timed(calls) for _ in range(5 if once < budget else 1))


def launches(call: Callable[[], Any]) -> int:
    """Kernels and memory operations that a call puts on the device."""
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    return sum(1 for event in profiled.events() if event.device_type.name == "CUDA")


def measure(
    case: Case,
    device: torch.device,
    budget: float,
    against: Sequence[str],
    copy: float,
    queued: bool = True,
) -> dict[str, Any]:
    row: dict[str, Any] = {}
    rivals: dict[str, Callable[[], Any]] = {"ours": lambda: case.call(ops)}
    if "eager" in against:
        rivals["eager"] = lambda: case.call(reference)
    if case.native and "native" in against:
        rivals["native"] = case.native
        row["native_op"] = case.native_name
    if case.compiles and "compiled" in against:
        rivals["compiled"] = torch.compile(lambda: case.call(reference), dynamic=False)
    for name, call in rivals.items():
        try:
            with torch.no_grad():
                if name == "compiled":
                    call()
                row[f"forward_{name}_s"] = seconds(call, device, budget, queued)
            if case.leaves:
                out = call()
                cotangent = torch.ones_like(out)

                def backward(out: Tensor = out, cotangent: Tensor = cotangent) -> object:
                    leaves = case.leaves
                    return torch.autograd.grad(out, leaves, cotangent, retain_graph=True)

                if name == "compiled":
                    backward()
                row[f"backward_{name}_s"] = seconds(backward, device, budget, queued)
                if name == "ours" and device.type == "cuda":
                    row["backward_launches"] = launches(backward)
        except Exception as error:
            if name == "ours":
                raise
            row[f"{name}_failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
        if name == "ours" and device.type == "cuda":
            with torch.no_grad():
                row["forward_launches"] = launches(call)
    row["forward_bytes"], row["forward_of_copy"] = (
        case.forward_bytes,
        case.forward_bytes / row["forward_ours_s"] / copy,
    )
    if case.leaves:
        row["backward_bytes"] = case.backward_bytes
        row["backward_of_copy"] = case.backward_bytes / row["backward_ours_s"] / copy
    if case.flops:
        row["forward_tflops"] = case.flops / row["forward_ours_s"] / 1e12
    return row


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second that a copy of `size` bytes within the device reads and writes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device, 0.3)


def large_sizes() -> Sizes:
    """Fewer clients on a GPU with less memory than its gradients and those of the twins take."""
    memory = torch.cuda.get_device_properties(0).total_memory
    return LARGE if memory >= 40 << 30 else dataclasses.replace(LARGE, C=LARGE.C // 4)


def benchmark(
    device: torch.device,
    names: list[str],
    emulated: bool,
    against: Sequence[str] = RIVALS,
    keep: Callable[[dict[str, Any]], object] = lambda results: None,
) -> dict[str, Any]:
    """`keep` is given what there is after every case."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # compiled gradients are asked for again and again
    copy = copy_bandwidth(device, 1 << 12 if emulated else 1 << 30)
    results: dict[str, Any] = {"copy_bytes_per_s": copy}
    failures = Failures(device)
    shapes = [("large", TINY), ("small", TINY)] if emulated else [("large", large_sizes()), ("small", SMALL)]
    for label, sizes in shapes:
        results[label] = {}
        for name, make in chosen(names).items():
            if failures.lost:
                break
            with failures.of(f"{name} ({label})"):
                case = make(sizes, Draw(device))
                at_large = label == "large" and not emulated
                if not (at_large and case.slow_twin):
                    compare(f"{name} ({label})", case)
                budget = 0.0 if emulated else 0.15
                # Compiling is slow, and says nothing about what launches bind.
                without = {"eager" if case.slow_twin else ""} if at_large else {"compiled"}
                others = [r for r in against if r not in without]
                row = measure(case, device, budget, others, copy, queued=label == "large")
                results[label][name] = row
                print(f"  {label} {name}: {json.dumps(row)}", flush=True)
                keep(results)
            case = None
            if device.type == "cuda" and not failures.lost:
                torch.compiler.reset()
                torch.cuda.empty_cache()
    failures.end()
    return results


STEPS: dict[str, Callable[[torch.device, list[str], bool], dict[str, Any]]] = {
    "touch": touch,
    "streams": streams,
    "graphs": graphs,
    "large": large,
    "benchmark": benchmark,
}


def unmeasured_first() -> list[str]:
    """All cases; first those that no report beside this script has, of which least is known."""
    known: set[str] = set()
    for report in (ROOT / "benchmarks" / "results").glob("gpu-*.json"):
        known |= json.loads(report.read_text()).get("benchmark", {}).get("large", {}).keys()
    return sorted(CASES, key=lambda name: name in known)


@contextlib.contextmanager
def kernels(emulated: bool) -> Iterator[torch.device]:
    if not emulated:
        yield torch.device("cuda")
        return
    sys.path.insert(0, str(ROOT / "python_tests"))
    from emulated import EMULATED, emulated_kernels

    if not EMULATED:
        sys.exit("gpu_kernels: fedpeft_ext._emulator is not built: make build EMULATOR=1")
    with emulated_kernels():
        yield torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description="Checks and measurements of the CUDA kernels")
    parser.add_argument("steps", nargs="+", choices=STEPS)
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--case", action="append", choices=CASES, help="cases (default: all)")
    parser.add_argument("--emulated", action="store_true")
    parser.add_argument(
        "--rivals", default=",".join(RIVALS), help=f"of {','.join(RIVALS)} (default: all; empty: none)"
    )
    parser.add_argument(
        "--dtypes", help=f"for touch, of {','.join(DTYPES)} (default: all; emulated: float32)"
    )
    options = parser.parse_args()
    dtypes = (options.dtypes or ("float32" if options.emulated else ",".join(DTYPES))).split(",")
    if unknown := set(dtypes) - DTYPES.keys():
        parser.error(f"--dtypes: expected some of {','.join(DTYPES)}, got {','.join(sorted(unknown))}")
    against = [name for name in options.rivals.split(",") if name]
    if unknown := set(against) - set(RIVALS):
        parser.error(f"--rivals: expected some of {','.join(RIVALS)}, got {','.join(sorted(unknown))}")
    results: dict[str, Any] = {}

    def write() -> None:
        if options.json:
            options.json.write_text(json.dumps(results))

    def keep(rows: dict[str, Any]) -> None:
        results["benchmark"] = rows
        write()

    with kernels(options.emulated) as device:
        for step in options.steps:
            names = options.case or unmeasured_first()
            if step == "touch":
                results[step] = touch(device, names, options.emulated, dtypes)
            elif step == "benchmark":
                results[step] = benchmark(device, names, options.emulated, against, keep)
            else:
                results[step] = STEPS[step](device, names, options.emulated)
            write()


if __name__ == "__main__":
    main()
