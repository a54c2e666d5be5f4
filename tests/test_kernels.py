"""The fused ops of model.py against plain torch in fp64: the kernels in Triton's interpreter (fp32)
and, marked gpu, in bf16 on a CUDA device; the references; and kernels compiled for absent chips.

The interpreter is chosen when triton is imported. So this file runs a second time in a child
process that has TRITON_INTERPRET=1: tests marked `interpreted` run there, the others here."""

import json
import os
from functools import partial
from itertools import combinations
from typing import NamedTuple

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad

triton = pytest.importorskip("triton")

from conftest import run  # noqa: E402

import model  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OLD_PAIR = triton.__version__ < "3.7" and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0"
slow = pytest.mark.slow
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the child process below")
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
starts_interpreter = pytest.mark.skipif(
    INTERPRETED or OLD_PAIR, reason="in the child, or triton 3.6's interpreter on numpy 2.4")
gpu = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(),
                                           reason="needs a CUDA device")]


@starts_interpreter
@pytest.mark.parametrize("tier", ["not slow", pytest.param("slow", marks=slow)])
def test_kernels_in_the_interpreter(tier):
    """Any wrong formula, mask or offset in a kernel: the tests marked `interpreted`."""
    result = run("-m", "pytest", "-q", "-x", __file__, "-m", tier, "-p", "no:cacheprovider",
                 timeout=300, env={"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-4000:]


# ---------------------------------------------------------------------------------------------
# what to compare


class Case(NamedTuple):
    op: callable
    plain: callable  # the op as one would write it in torch; in float64 it is right
    tensors: tuple  # float64, or int64 targets
    dtypes: tuple
    rest: tuple = ()  # arguments after the tensors


NAMES = ["add_layer_norm", "bias_gelu", "cross_entropy", "attention"]
F32 = torch.float32


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def rand(*shape, mean=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64) + mean


def some_targets(rows, V):
    """Targets from 3 to below V, every third ignored for it is 2."""
    targets = torch.randint(3, V, (rows,), generator=torch.Generator().manual_seed(1))
    targets[1::3] = 2
    return targets


def plain_add_norm(x, residual, weight, bias, eps):
    new_residual = residual + x
    y = F.layer_norm(new_residual, weight.shape, weight, bias, eps)
    return y.to(x.dtype), new_residual


def plain_gelu(x, bias):
    return F.gelu(x + bias.to(x.dtype), approximate="tanh")


def plain_loss(hidden, weight, targets, ignore_index):
    logits = hidden @ weight.to(hidden.dtype).T
    return F.cross_entropy(model.at_least_fp32(logits), targets, ignore_index=ignore_index)


def plain_attention(qkv, n_head, scale):
    q, k, v = model.split_heads(qkv, n_head)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return o.transpose(1, 2).flatten(2)


def cross_entropy_case(rows, width, V, dtype=F32):
    tensors = (rand(rows, width), rand(V, width, seed=3), some_targets(rows, V))
    return Case(model.cross_entropy, plain_loss, tensors, (dtype, F32, torch.int64), (2,))


def make_case(name, rows, width, heads=2, dtype=F32):
    """One op's case, with fp32 parameters and residual stream as under autocast."""
    x = rand(rows, width)
    residual = rand(rows, width, mean=100, seed=2)
    weight = rand(width, mean=1)
    bias = rand(width, seed=1)
    op = getattr(model, name)
    if name == "add_layer_norm":
        return Case(op, plain_add_norm, (x, residual, weight, bias), (dtype, F32, F32, F32),
                    (0.1,))
    if name == "bias_gelu":
        return Case(op, plain_gelu, (x, bias), (dtype, F32))
    if name == "cross_entropy":
        return cross_entropy_case(rows, width, 515, dtype)
    qkv = rand(2, max(rows // 2, 3), 3 * width)
    return Case(op, plain_attention, (qkv,), (dtype,), (heads, 0.3))


def with_dropout(name, case, p, seed):
    """The case with dropout, if its op has any. Then the reference is what it must equal: that
    draws the same mask in float64."""
    if p == 0 or name not in ("add_layer_norm", "attention"):
        return case
    plain = getattr(model, f"{name}_ref")
    return case._replace(plain=plain, rest=(*case.rest, p, seed))


def results(fn, tensors, dtypes, *rest):
    """Outputs and every gradient of fn on copies of `tensors` cast to dtypes. Output gradients are
    random: with ones, LayerNorm's dx is 0 and a wrong formula would pass."""
    leaves = []
    for tensor, dtype in zip(tensors, dtypes):
        leaf = tensor.to(dtype, copy=True)
        leaves.append(leaf.requires_grad_(leaf.is_floating_point()))
    outputs = as_tuple(fn(*leaves, *rest))
    grads = [rand(*o.shape, seed=5).bfloat16().to(o) for o in outputs]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [t.detach() for t in (*outputs, *grad(outputs, wanted, grads))]


def ours(case):
    return results(case.op, case.tensors, case.dtypes, *case.rest)


def check(case):
    """max|ours - fp64| <= 2 max|torch's own op in the same dtypes - fp64|, for outputs and
    gradients, on inputs that those dtypes hold exactly."""
    tensors = [t.to(d).to(t.dtype) for t, d in zip(case.tensors, case.dtypes)]
    got = results(case.op, tensors, case.dtypes, *case.rest)
    theirs = results(case.plain, tensors, case.dtypes, *case.rest)
    exact = results(case.plain, tensors, [t.dtype for t in tensors], *case.rest)
    for i, (a, b, e) in enumerate(zip(got, theirs, exact)):
        assert a.shape == e.shape
        # Where torch happens to be exact: less than a bf16 rounding, or a few fp32 ones at mean
        # 100, of the largest value.
        floor = 2**-10 if a.dtype == torch.bfloat16 else 1e-5
        allowed = 2 * (b - e).abs().amax() + floor * e.abs().amax()
        error = (a - e).abs().amax()
        assert error <= allowed, f"tensor {i}: error {error:.3g}, allowed {allowed:.3g}"


def check_compiled(device, tolerance, **compile_options):
    """Compiled blocks give eager's loss and gradients, and new seeds compile nothing anew."""
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    config = model.GPTConfig(1, 2, 32, 16, 61, dropout=0.2)
    idx = torch.arange(16, device=device)[None]

    def train(compiled):
        torch.manual_seed(1)
        gpt = model.GPT(config).to(device)
        if compiled:
            for block in gpt.transformer.h:
                block.compile(**compile_options)
        count = []
        for _ in range(4):
            loss = gpt(idx, idx)[1]
            loss.backward()
            count.append(graphs["unique_graphs"])
        return count, [loss.detach(), *(p.grad for p in gpt.parameters())]

    _, expected = train(False)
    count, got = train(True)
    assert 0 < count[1] == count[3]  # the second seed may: it becomes a variable
    for a, b in zip(got, expected):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


# ---------------------------------------------------------------------------------------------
# in the interpreter


@interpreted
def test_sum_programs():
    """Programs past the first tile lost, or a column past the first: a GPU has more than a CPU."""
    partial = rand(130, 2, 37)
    assert torch.allclose(model.sum_programs(partial.float()), partial.sum(0).float(),
                          atol=1e-5)


# every width and every row count of tests.md, not every pair; 130 rows are slow here
@interpreted
@pytest.mark.parametrize("rows,width", [
    (3, 1), (35, 7), (3, 64), (1, 1000), (3, 1023), (1, 2560), (3, 2560), (20, 768),
    pytest.param(130, 7, marks=slow), pytest.param(130, 768, marks=slow)])
def test_norms_and_gelu_match_fp64(rows, width):
    """K1: a wrong dx, dγ or dβ, a lane outside the row in a sum, cancellation at mean 100. K8:
    forward or backward with another mask, rate or factor than the reference."""
    for name, p in ("add_layer_norm", 0.0), ("add_layer_norm", 0.3), ("bias_gelu", 0.0):
        check(with_dropout(name, make_case(name, rows, width), p, 2**31 - 8))


@interpreted
@pytest.mark.parametrize("T,D,BM,BN", [(1, 16, 32, 32), (37, 16, 32, 16), (64, 40, 16, 16),
                                       (48, 16, 16, 32), (100, 40, 32, 64)])
def test_attention_matches_fp64(T, D, BM, BN, monkeypatch):
    """K1: tiles at the diagonal and past the end, wide and high, padded head widths, head and batch
    offsets, the scale, a read past the end (NaN lies there). K8: one of the three kernels with
    another mask than the reference, heads or rows of the batch that share one."""
    monkeypatch.setattr(model, "attention_tile", lambda *_: (BM, BN, 4, 1))

    def op(qkv, *rest):
        beyond = torch.full_like(qkv[:1], torch.nan)
        return model.attention(torch.cat([qkv, beyond])[:-1], *rest)

    case = Case(op, plain_attention, (rand(2, T, 3 * 2 * D),), (F32,), (2, 0.3))
    for p in (0.0, 0.25):
        check(with_dropout("attention", case, p, 3))


@interpreted
@pytest.mark.parametrize("rows,width,V", [(1, 7, 5), (3, 64, 1000), (130, 64, 515)])
def test_cross_entropy_matches_fp64(rows, width, V, monkeypatch):
    """K1: the online softmax over blocks, chunk edges, ignored rows, the division by the count."""
    monkeypatch.setattr(model, "CROSS_ENTROPY_BLOCK", 256)
    monkeypatch.setattr(model, "CROSS_ENTROPY_CHUNK", 50)
    check(cross_entropy_case(rows, width, V))


@interpreted
def test_cross_entropy_at_its_edges():
    """K4: overflow at logits of 1e4, gradient rows that don't sum to 0; K3: a mean over no target
    (0 with zero gradients, by our choice), negative ignore_index read as an address."""
    V = 32
    hidden = (1e4 * rand(6, V).sign().float()).requires_grad_()
    loss = model.cross_entropy(hidden, torch.eye(V), torch.arange(6))
    (dhidden,) = grad(loss, hidden)
    assert loss.isfinite() and dhidden.isfinite().all() and dhidden.sum(1).abs().max() < 1e-6
    loss = model.cross_entropy(hidden, torch.eye(V), torch.full((6,), -100))
    assert loss == 0 and (grad(loss, hidden)[0] == 0).all()


@interpreted
@pytest.mark.parametrize("name", NAMES)
def test_strided_empty_and_no_grad(name):
    """K3: strides ignored, a launch over an empty grid, saved tensors or failures under no_grad."""
    case = make_case(name, 4, 32)
    tensors = [t.to(d) for t, d in zip(case.tensors, case.dtypes)]
    holds_rows = {"add_layer_norm": (0, 1), "cross_entropy": (0, 2)}.get(name, (0,))

    def strided(t):
        return torch.stack([t, t + 1], -1)[..., 0]

    def transposed(fn, *args):  # so the gradients that fn gets have strides
        return tuple(o.mT.contiguous() if o.dim() else o for o in as_tuple(fn(*args)))

    def op(*args):
        args = [strided(t) if i in holds_rows else t for i, t in enumerate(args)]
        return transposed(case.op, *args)

    check(case._replace(op=op, plain=partial(transposed, case.plain)))
    with torch.no_grad():
        assert all(o.grad_fn is None for o in as_tuple(case.op(*tensors, *case.rest)))
    for i in holds_rows:
        tensors[i] = tensors[i][:0].clone()
    outputs = as_tuple(case.op(tensors[0].requires_grad_(), *tensors[1:], *case.rest))
    grad([o.sum() for o in outputs], tensors[0])


def test_dropout_is_a_function_of_its_seed():
    """K8: a wrong rate or factor, in the kernels too, or seeds that share a mask: the model draws
    them from all 31 bits."""
    masks = []
    for seed in (7, 8, 2**31 - 9, 2**31 - 8):
        x = model.dropout_ref(torch.ones(8, 4, 1000), 0.3, seed)
        assert torch.equal(x, model.dropout_ref(torch.ones(8, 4, 1000), 0.3, seed))
        assert torch.allclose(x.unique(), torch.tensor([0, 1 / 0.7]))
        assert abs(x.mean() - 1) < 0.02
        masks.append(x > 0)
    assert all((a == b).float().mean() < 0.6 for a, b in combinations(masks, 2))  # 0.58 by chance


def worst_deviation(p):
    """How far 128 masks of neighbouring seeds are from independent draws, in standard deviations:
    their mean, and χ² of the sums of rows, of columns, and of products of elements a lag apart;
    the correlations of all 8,128 pairs of masks."""
    masks = [model.dropout_ref(torch.ones(128, 512), p, seed) > 0 for seed in range(128)]
    z = (torch.stack(masks).float() - (1 - p)) / (p * (1 - p)) ** 0.5  # mean 0, variance 1

    def chi2(x, axis):
        squares = (x.sum(axis) / x.shape[axis] ** 0.5).square()
        return (squares.mean() - 1) / squares.std() * squares.numel() ** 0.5

    found = [z.mean() * z.numel() ** 0.5, chi2(z, 1), chi2(z, 2)]
    for lag in (1, 2, 3, 5, 8, 64):
        for apart in (z[:, lag:] * z[:, :-lag], z[:, :, lag:] * z[:, :, :-lag]):
            found += [chi2(apart, 1), chi2(apart, 2)]
    pairs = z.flatten(1) @ z.flatten(1).T / z[0].numel() ** 0.5
    return max(*map(abs, found), pairs.triu(1).abs().max())


@slow
def test_dropout_statistics(monkeypatch):
    """K8: a hash too weak to look random. Without its last multiplication it must fail."""
    assert worst_deviation(0.1) < 6 and worst_deviation(0.5) < 6

    def weak(key, col, threshold):
        x = ((key ^ (col * 0x9E3779B1)) * 0x7FEB352D) & 0xFFFFFFFF
        return (x ^ (x >> 15)) >= threshold

    monkeypatch.setattr(model, "stays", weak)
    assert worst_deviation(0.1) > 10


@slow  # half a minute of compiling
@interpreted
def test_compiled_equals_eager():
    """K5 without a GPU: a graph that goes on without an op's backward, or is made for each seed."""
    check_compiled("cpu", 0, backend="aot_eager")


# ---------------------------------------------------------------------------------------------
# without a kernel


@pytest.fixture
def no_kernel(monkeypatch):
    monkeypatch.setattr(model, "INTERPRETED", False)


def test_references_match_fp64(no_kernel):
    """K1 on the path of a CPU, attention's written-out formula included, which only dropout
    takes."""
    for name in NAMES:
        check(make_case(name, 6, 32))
    case = make_case("attention", 6, 32)
    nothing_dropped = (1e-9, 1)
    check(case._replace(op=lambda *args: model.attention_ref(*args, *nothing_dropped)))


def test_autocast_dtypes(no_kernel):
    """Activations that stay fp32 under autocast, twice as large, or a residual stream in bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        for name in NAMES:
            case = make_case(name, 4, 32)
            outputs = as_tuple(case.op(*[t.to(d) for t, d in zip(case.tensors, case.dtypes)],
                                       *case.rest))
            narrow = [F32 if name == "cross_entropy" else torch.bfloat16]
            assert [o.dtype for o in outputs] == narrow + [F32] * (len(outputs) - 1), name


def test_reference_cross_entropy_in_chunks(no_kernel, monkeypatch):
    """The CPU's path building whole logits, or wrong at a chunk's edge or at ignored rows."""
    monkeypatch.setattr(model, "CROSS_ENTROPY_CHUNK", 50)
    case = cross_entropy_case(130, 64, 515)
    check(case)
    with torch.profiler.profile(record_shapes=True) as profile:
        ours(case)
    rows = [event.input_shapes[0][0] for event in profile.events()
            if event.name == "aten::_log_softmax"]
    assert rows == [50, 50, 30]


# ---------------------------------------------------------------------------------------------
# cross-compiled for chips that are not here

SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}


def assert_fits(kernel, arguments, options, target):
    from bench import cross_compile, resources
    compiled = cross_compile(kernel, arguments, options, target)
    name = f"{kernel.__name__} on {target}"
    shared = compiled.metadata.shared
    assert shared <= SHARED_BYTES[target], f"{name}: {shared} bytes of shared memory"
    registers, stack = resources(compiled)
    # triton 3.6 keeps one register pair of dK/dV's on the stack, and is fastest at that tile
    most = 8 if triton.__version__ < "3.7" and "dkv" in name else 0
    assert stack <= most, f"{name} spills: {stack} bytes of stack at {registers} registers"
    if target == "sm_90" and "BM" in arguments:
        assert "wgmma.mma_async" in compiled.asm["ptx"], f"{name}: matrix products are not wgmma"


@slow  # the fast tier compiles one kernel, below
@compiles
@pytest.mark.parametrize("target", ["sm_90", "sm_80"])
@pytest.mark.parametrize("C,n_head", [(2560, 20), (768, 12)])
def test_kernels_cross_compile(target, C, n_head):
    """K9: a kernel that only the interpreter accepts; registers spilled; more shared memory than
    the chip has; attention off the tensor cores' fast path on Hopper."""
    from bench import recorded_launches
    launches = recorded_launches(target, C, n_head)
    assert len({kernel.__name__ for kernel, *_ in launches}) == 9  # every kernel of model.py
    for launch in launches:
        assert_fits(*launch, target)


@compiles
def test_a_spilling_kernel_is_caught():
    """K9's own check gone blind: attention at twice the tile and half the threads a row must fail
    it, where its own settings pass."""
    from bench import recorded_launches
    launches = {kernel.__name__: (kernel, *rest) for kernel, *rest in recorded_launches("sm_90")}
    kernel, arguments, options = launches["attention_forward_kernel"]
    assert_fits(kernel, arguments, options, "sm_90")
    with pytest.raises(AssertionError, match="spills"):
        assert_fits(kernel, {**arguments, "BM": 128, "BN": 64}, {"num_warps": 4}, "sm_90")


# ---------------------------------------------------------------------------------------------
# on a GPU


class TestOnGPU:
    pytestmark = gpu

    def case(self, name, rows=300, width=2560, heads=20):
        case = make_case(name, rows, width, heads, torch.bfloat16)
        return case._replace(tensors=[t.cuda() for t in case.tensors])

    @pytest.mark.parametrize("width,heads", [(2560, 20), (768, 12), (1000, 10)])
    @pytest.mark.parametrize("name", NAMES)
    def test_bf16_error(self, name, width, heads):
        """A kernel less exact in bf16 than torch's own op."""
        check(self.case(name, width=width, heads=heads))

    def test_compiled_equals_eager(self):
        """K5: the same by inductor, in bf16."""
        with torch.autocast("cuda", torch.bfloat16):
            check_compiled("cuda", 2**-6)

    @pytest.mark.parametrize("p", [0.0, 0.1])
    @pytest.mark.parametrize("name", NAMES)
    def test_bit_identical(self, name, p):
        """K6: a race, or a sum whose order depends on timing. K8: a mask that depends on the
        generator's state, or that moves it."""
        case = with_dropout(name, self.case(name, rows=4000), p, 5)
        before = torch.cuda.get_rng_state()
        first, *again = (ours(case) for _ in range(4))
        assert all(torch.equal(a, b) for other in again for a, b in zip(first, other))
        assert torch.equal(before, torch.cuda.get_rng_state())

    def test_logits_past_2_to_31(self, monkeypatch):
        """K7: 32-bit row offsets, at 80,000 rows of 28,896 logits in one chunk."""
        case = cross_entropy_case(80_000, 64, 28_896, torch.bfloat16)
        case = case._replace(tensors=[t.cuda() for t in case.tensors])
        small = ours(case)
        monkeypatch.setattr(model, "CROSS_ENTROPY_CHUNK", 80_000)
        for a, b in zip(ours(case), small):
            assert (a - b).abs().max() <= 2**-6 * b.abs().max()

    def test_rows_past_2_to_31(self):
        """K7: 32-bit row offsets, at 300,000 rows of 10,240 columns."""
        x = torch.randn(300_000, 10_240, device="cuda", dtype=torch.bfloat16)
        tail = x[-100:].clone()
        zeros = torch.zeros(10_240, device="cuda")
        assert torch.equal(model.bias_gelu(x, zeros)[-100:], model.bias_gelu(tail, zeros))
        # One by one: each tensor is 6 or 12 GB.
        y = model.add_layer_norm(x, x, zeros + 1, zeros)[0][-100:].clone()
        assert torch.equal(y, model.add_layer_norm(tail, tail, zeros + 1, zeros)[0])


@slow
@starts_interpreter
def test_training_the_demo_in_the_interpreter(tmp_path):
    """Kernels that are right alone but wired wrongly into the model: the demo's losses differ."""
    assert run("data.py", "demo", "--out", tmp_path / "demo").returncode == 0

    def losses(out, env):
        """(standard output, every loss of the log) of three steps."""
        flags = ("--total_steps 3 --batch_tokens 256 --log_every 1 --lr 0.01 --warmup_steps 1 "
                 "--eval_tokens 256 --preset demo --device cpu")
        done = run("train.py", *flags.split(), "--data", tmp_path / "demo", "--out", out,
                   env={**env, "OMP_NUM_THREADS": "1"}, timeout=900)
        assert done.returncode == 0, done.stderr
        rows = map(json.loads, (out / "log.jsonl").read_text().splitlines())
        return done.stdout, [row.get("loss", row.get("val_loss")) for row in rows]

    text, ours = losses(tmp_path / "kernels", {"TRITON_INTERPRET": "1"})
    assert "interpreter" in text
    text, plain = losses(tmp_path / "reference", {})
    assert "interpreter" not in text
    assert len(ours) == 5 and ours[0] != ours[-1]
    assert all(abs(a - b) <= 1e-5 for a, b in zip(ours, plain))
