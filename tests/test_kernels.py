"""The fused kernels of model.py against fp64 references: in Triton's interpreter (fp32), cross-
compiled for chips that are not here, and, marked gpu, in bf16 on a CUDA device.

The interpreter is chosen when triton is imported, so this file is run by itself in a child process
that has TRITON_INTERPRET=1; tests marked `interpreted` run there, the others here."""

import json
import os

import numpy
import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")

from conftest import run  # noqa: E402

import model  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the child process below")
OLD_PAIR = triton.__version__ < "3.7" and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0"
slow = pytest.mark.slow
gpu = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(),
                                           reason="needs a CUDA device")]
# (rows, width): every width and every row count of tests.md, not every pair; 130 rows are slow here
SHAPES = [(3, 1), (35, 7), (3, 64), (1, 1000), (3, 1023), (1, 2560), (3, 2560), (20, 768),
          pytest.param(130, 7, marks=slow), pytest.param(130, 768, marks=slow)]


@pytest.mark.skipif(INTERPRETED, reason="already in the child")
@pytest.mark.skipif(OLD_PAIR, reason="triton 3.6's interpreter fails on numpy 2.4")
@pytest.mark.parametrize("tier", ["not slow", pytest.param("slow", marks=slow)])
def test_kernels_in_the_interpreter(tier):
    """Any wrong formula, mask or offset in a kernel: the tests marked `interpreted`."""
    result = run("-m", "pytest", "-q", "-x", __file__, "-m", tier, "-p", "no:cacheprovider",
                 timeout=300, env={"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-4000:]


# ---------------------------------------------------------------------------------------------
# what to compare


def rand(*shape, mean=0.0, seed=0, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    noise = torch.randn(shape, generator=generator, dtype=dtype)
    return (noise + mean).to(device).requires_grad_()


def results(fn, tensors, dtypes, *rest):
    """Outputs and every gradient of fn on copies of `tensors` cast to dtypes, in float64 for
    comparison. Output gradients are random: with ones, LayerNorm's dx is 0 and a wrong formula
    would pass."""
    leaves = [t.detach().to(d).requires_grad_() if t.is_floating_point() else t
              for t, d in zip(tensors, dtypes)]
    outputs = fn(*leaves, *rest)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [rand(*o.shape, seed=5, device=o.device).bfloat16().to(o.dtype) for o in outputs]
    wanted = [leaf for leaf in leaves if leaf.is_floating_point()]
    return [t.detach() for t in (*outputs, *torch.autograd.grad(outputs, wanted, grads))]


def check(ours, torchs, reference, tensors, dtypes, *rest):
    """max|ours - fp64| <= 2 max|torch's own op in the same dtypes - fp64|, for outputs and
    gradients, on inputs that those dtypes hold exactly. floor: less than a bf16 rounding, or a few
    fp32 ones at mean 100, relative to the largest value, for when torch happens to be exact."""
    tensors = [t.to(d).to(t.dtype) for t, d in zip(tensors, dtypes)]
    exact = results(reference, tensors, [torch.float64] * len(tensors), *rest)
    for i, (a, b, e) in enumerate(zip(results(ours, tensors, dtypes, *rest),
                                      results(torchs, tensors, dtypes, *rest), exact)):
        assert a.shape == e.shape
        floor = 2**-10 if a.dtype == torch.bfloat16 else 1e-5
        error, allowed = (a - e).abs().amax(), 2 * (b - e).abs().amax() + floor * e.abs().amax()
        assert error <= allowed, f"tensor {i}: error {error:.3g}, allowed {allowed:.3g}"


def qkv_like(B, T, H, D, device="cpu"):
    return rand(B, T, 3 * H * D, device=device)


def op_cases(device, dtype, rows, width, heads):
    """(name, op, its plain version in torch, reference, tensors, dtypes, other arguments) of every
    op, with fp32 parameters and residual stream as under autocast."""
    f32, w = torch.float32, rand(width, mean=1, device=device)
    b = rand(width, seed=1, device=device)
    x, r = rand(rows, width, device=device), rand(rows, width, mean=100, seed=2, device=device)
    targets = torch.randint(0, 515, (rows,), generator=torch.Generator().manual_seed(0)).to(device)
    targets[::3] = -100

    def plain_norm(x, r, w, b):
        new = r + x
        return F.layer_norm(new, (width,), w, b).to(x.dtype), new

    def plain_gelu(x, b):
        return F.gelu(x + b.to(x.dtype), approximate="tanh")

    def plain_loss(h, w, t):
        return F.cross_entropy((h @ w.to(h.dtype).T).float(), t)

    def plain_attention(qkv, n_head, scale):
        q, k, v = model.split_heads(qkv, n_head)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return o.transpose(1, 2).flatten(2)

    yield ("add_layer_norm", model.add_layer_norm, plain_norm, model.add_layer_norm_ref,
           (x, r, w, b), (dtype, f32, f32, f32), ())
    yield ("layer_norm", model.layer_norm, lambda x, w, b: F.layer_norm(x, (width,), w, b),
           model.layer_norm_ref, (r, w, b), (f32, f32, f32), ())
    yield "bias_gelu", model.bias_gelu, plain_gelu, model.bias_gelu_ref, (x, b), (dtype, f32), ()
    yield ("cross_entropy", model.cross_entropy, plain_loss, model.cross_entropy_ref,
           (x, rand(515, width, seed=3, device=device), targets), (dtype, f32, torch.int64), ())
    yield ("attention", model.attention, plain_attention, model.attention_ref,
           (rand(2, max(rows // 2, 3), 3 * width, device=device),), (dtype,), (heads, 0.3))


# ---------------------------------------------------------------------------------------------
# in the interpreter


@interpreted
@pytest.mark.parametrize("rows,width", SHAPES)
def test_norms_and_gelu_match_fp64(rows, width):
    """K1: a wrong dx, dγ or dβ, a lane outside the row in a sum, cancellation at mean 100."""
    for name, *case, rest in op_cases("cpu", torch.float32, rows, width, 1):
        if name in ("layer_norm", "add_layer_norm", "bias_gelu"):
            check(*case, *rest)


@interpreted
@pytest.mark.parametrize("T,D", [(1, 16), (37, 16), (64, 64), (130, 40)])
def test_attention_matches_fp64(T, D):
    """K1: tiles at the diagonal and past the end, padded head widths, head and batch offsets, the
    scale."""
    check(model.attention, model.attention_ref, model.attention_ref, (qkv_like(2, T, 2, D),),
          (torch.float32,), 2, 0.3)


@interpreted
@pytest.mark.parametrize("rows,width,V", [(1, 7, 5), (3, 64, 1000), (130, 64, 515)])
def test_cross_entropy_matches_fp64(rows, width, V, monkeypatch):
    """K1: the online softmax over blocks, chunk edges, ignored rows, the division by the count."""
    monkeypatch.setitem(model.LAUNCH, "cross_entropy", {"block": 256, "warps": 4, "chunk_rows": 50})
    targets = torch.randint(0, V, (rows,), generator=torch.Generator().manual_seed(1))
    targets[1::4] = -100
    case = (rand(rows, width), rand(V, width, seed=1), targets)
    check(model.cross_entropy, model.cross_entropy_ref, model.cross_entropy_ref, case,
          (torch.float32, torch.float32, torch.int64))


@interpreted
def test_cross_entropy_at_its_edges():
    """K4: overflow at logits of 1e4, gradient rows that don't sum to 0, ln V missed; K3: a mean
    over no target (0 with zero gradients, by our choice), negative ignore_index read as an
    address."""
    V, eye = 32, torch.eye(32)
    hidden = (1e4 * rand(6, V).sign().float()).detach().requires_grad_()
    loss = model.cross_entropy(hidden, eye, torch.arange(6))
    (dhidden,) = torch.autograd.grad(loss, hidden)
    assert loss.isfinite() and dhidden.isfinite().all() and dhidden.sum(1).abs().max() < 1e-6
    uniform = model.cross_entropy(torch.zeros(6, V), eye, torch.arange(6))
    assert abs(uniform.item() - torch.tensor(float(V)).log().item()) < 1e-6
    loss = model.cross_entropy(hidden, eye, torch.full((6,), -100))
    assert loss == 0 and (torch.autograd.grad(loss, hidden)[0] == 0).all()


@interpreted
def test_strided_empty_and_no_grad():
    """K3: strides ignored, a launch over an empty grid, saved tensors or failures under no_grad."""
    for _name, op, *_, reference, tensors, dtypes, rest in op_cases("cpu", torch.float32, 4, 32, 2):
        tensors = [t.detach().to(d) for t, d in zip(tensors, dtypes)]
        wide = torch.stack([tensors[0]] * 2, -1)
        with torch.no_grad():
            strided = op(wide[..., 0], *tensors[1:], *rest)
            expected = reference(*tensors, *rest)
        for a, e in zip(strided if isinstance(strided, tuple) else (strided,),
                        expected if isinstance(expected, tuple) else (expected,)):
            assert torch.allclose(a, e, atol=1e-4) and a.grad_fn is None
        rows_of = {0: 0, 1: 0} if op is model.add_layer_norm else {0: 0}
        rows_of |= {2: 0} if op is model.cross_entropy else {}
        empty = [t[:0].clone() if i in rows_of else t for i, t in enumerate(tensors)]
        out = op(empty[0].requires_grad_(), *empty[1:], *rest)
        out = out if isinstance(out, tuple) else (out,)
        torch.autograd.grad([o.sum() for o in out], empty[0])


@interpreted
def test_dropout_masks():
    """K8: backward dropping other elements than forward, a wrong rate or scale, a mask that
    ignores the seed, the row or the column."""
    N, C, p = 32, 1000, 0.3
    x, r, w, b = (torch.ones(N, C), torch.zeros(N, C), torch.ones(C), torch.zeros(C))
    x.requires_grad_()
    new = model.add_layer_norm(x, r, w, b, 1e-5, p, 7)[1]
    (dx,) = torch.autograd.grad(new.sum(), x)
    assert torch.equal(dx, new.detach())  # with x = 1 both are mask / (1 - p)
    kept = new.detach() > 0
    assert torch.allclose(new[kept], torch.tensor(1 / (1 - p)))
    assert abs(kept.float().mean() - (1 - p)) < 3 * (p * (1 - p) / kept.numel()) ** 0.5
    for axis, n in ((0, N), (1, C)):  # no column or row, of n draws each, has another rate
        assert ((kept.float().mean(axis) - (1 - p)).abs() < 5 * (p * (1 - p) / n) ** 0.5).all()
    again, other = (model.add_layer_norm(x, r, w, b, 1e-5, p, seed)[1] > 0 for seed in (7, 8))
    assert torch.equal(again, kept) and abs((other == kept).float().mean() - 0.58) < 0.02


@interpreted
def test_attention_dropout_is_one_mask():
    """K8: forward, dK/dV and dQ kernels that disagree on the mask. V = identity shows P∘M, which a
    plain fp64 attention with that very mask must then reproduce, gradients included."""
    T, p = 64, 0.25
    qkv = rand(1, T, 3 * T)
    shown = qkv.detach().float()
    shown[..., 2 * T:] = torch.eye(T)
    q, k, _ = model.split_heads(shown, 1)
    below = torch.ones(T, T).tril().bool()
    P = (0.2 * q @ k.transpose(-2, -1)).masked_fill(~below, -torch.inf).softmax(-1)
    mask = (model.attention(shown, 1, 0.2, p, 3) / P[0]).nan_to_num()
    assert ((mask - 1 / (1 - p)).abs().lt(1e-3) | (mask == 0)).all()
    three_sigma = 3 * (p * (1 - p) / below.sum()) ** 0.5
    assert abs((mask[0][below] > 0).float().mean() - (1 - p)) < three_sigma

    def masked(qkv):
        q, k, v = model.split_heads(qkv, 1)
        S = (0.2 * q @ k.transpose(-2, -1)).masked_fill(~below, -torch.inf)
        return ((S.softmax(-1) * mask.sign() / (1 - p)) @ v).transpose(1, 2).flatten(2)

    check(lambda x: model.attention(x, 1, 0.2, p, 3), masked, masked, (qkv,), (torch.float32,))


@interpreted
@pytest.mark.parametrize("name", ["add_layer_norm"] + [pytest.param(name, marks=slow) for name in (
    "layer_norm", "bias_gelu", "cross_entropy", "attention")])
def test_compiled_equals_eager(name):
    """K5 without a GPU: a fake that lies about a shape or dtype, a graph break, a recompilation
    for every seed. The kernels still run in the interpreter, behind AOTAutograd's graph."""
    op, _, _, tensors, _, rest = next(case for found, *case in op_cases(
        "cpu", torch.float32, 6, 32, 2) if found == name)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    dtypes = [torch.float32 if t.is_floating_point() else torch.int64 for t in tensors]
    for seed in (3, 4, 5, 6):
        dropout = {"add_layer_norm": (1e-5, 0.2, seed), "attention": (*rest, 0.2, seed)}
        more = dropout.get(name, rest)
        expected = results(op, tensors, dtypes, *more)
        for a, b in zip(results(compiled, tensors, dtypes, *more), expected):
            assert torch.equal(a, b), name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2, name


# ---------------------------------------------------------------------------------------------
# without a kernel


def test_reference_cross_entropy_in_chunks(monkeypatch):
    """The CPU's path building whole logits, or wrong at a chunk's edge, at ignored rows, or where
    all are ignored."""
    monkeypatch.setattr(model, "INTERPRETED", False)
    monkeypatch.setitem(model.LAUNCH["cross_entropy"], "chunk_rows", 50)
    targets = torch.randint(0, 515, (130,), generator=torch.Generator().manual_seed(1))
    targets[1::4] = -100
    case, f32 = (rand(130, 64), rand(515, 64, seed=1), targets), torch.float32
    with torch.profiler.profile(record_shapes=True) as profile:
        check(model.cross_entropy, model.cross_entropy_ref, model.cross_entropy_ref, case,
              (f32, f32, torch.int64))
    shapes = [event.input_shapes[0] for event in profile.events()
              if event.name == "aten::_log_softmax"]
    assert sorted(shapes) == [[30, 515], [50, 515], [50, 515], [130, 515], [130, 515]]  # two refs
    ignored = model.cross_entropy(case[0].float(), case[1].float(), torch.full((130,), -100))
    assert ignored == 0 and (torch.autograd.grad(ignored, case[0])[0] == 0).all()


# ---------------------------------------------------------------------------------------------
# cross-compiled for chips that are not here

SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}


def assert_fits(kernel, arguments, options, target):
    from bench import cross_compile, resources
    compiled = cross_compile(kernel, arguments, options, target)
    name, shared = f"{kernel.__name__} on {target}", compiled.metadata.shared
    assert shared <= SHARED_BYTES[target], f"{name}: {shared} bytes of shared memory"
    if target.startswith("sm"):
        registers, stack = resources(compiled)
        # triton 3.6 keeps one register pair of dK/dV's on the stack, and is fastest at that tile
        most = 8 if triton.__version__ < "3.7" and "dkv" in name else 0
        assert stack <= most, f"{name} spills: {stack} bytes of stack at {registers} registers"
    if target == "sm_90" and arguments.get("BM"):
        assert "wgmma.mma_async" in compiled.asm["ptx"], f"{name}: matrix products are not wgmma"


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("target,C,n_head", [
    ("sm_90", 2560, 20), ("sm_80", 2560, 20), ("gfx942", 2560, 20), ("sm_90", 768, 12),
    ("sm_80", 768, 12)])
@slow  # the fast tier compiles one kernel, below
def test_kernels_cross_compile(target, C, n_head):
    """K9: a kernel that only the interpreter accepts; registers spilled; more shared memory than
    the chip has; attention off the tensor cores' fast path on Hopper."""
    from bench import recorded_launches
    launches = recorded_launches(target, C, n_head)
    assert len({kernel.__name__ for kernel, *_ in launches}) == 8  # every kernel of model.py
    for launch in launches:
        assert_fits(*launch, target)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_a_spilling_kernel_is_caught():
    """K9's own check gone blind: attention at twice the tile and half the threads a row must fail
    it, where its own settings pass."""
    from bench import recorded_launches
    kernel, arguments, options = next(item for item in recorded_launches("sm_90")
                                      if item[0].__name__ == "attention_forward_kernel")
    assert_fits(kernel, arguments, options, "sm_90")
    with pytest.raises(AssertionError, match="spills"):
        assert_fits(kernel, {**arguments, "BM": 128, "BN": 64}, {"num_warps": 4}, "sm_90")


# ---------------------------------------------------------------------------------------------
# on a GPU


class TestOnGPU:
    pytestmark = gpu
    names = ["add_layer_norm", "layer_norm", "bias_gelu", "cross_entropy", "attention"]

    def case(self, name, rows=300, width=2560, heads=20):
        torch.manual_seed(0)
        cases = op_cases("cuda", torch.bfloat16, rows, width, heads)
        return next(case for found, *case in cases if found == name)

    @pytest.mark.parametrize("width,heads", [(2560, 20), (768, 12), (1000, 10)])
    @pytest.mark.parametrize("name", names)
    def test_bf16_error(self, name, width, heads):
        """A kernel less exact in bf16 than torch's own op."""
        *case, rest = self.case(name, width=width, heads=heads)
        check(*case, *rest)

    @pytest.mark.parametrize("p", [0.0, 0.1])
    @pytest.mark.parametrize("name", names)
    def test_compiled_and_autocast_equal_eager(self, name, p):
        """K5: a fake that lies about shape, dtype or device, a graph break, a recompilation for
        each seed."""
        op, _, _, tensors, dtypes, rest = self.case(name)
        droppable = name in ("add_layer_norm", "attention")
        if p and not droppable:
            pytest.skip("has no dropout")
        if name == "add_layer_norm":
            rest = (1e-5,)
        torch._dynamo.reset()
        compiled = torch.compile(op, fullgraph=True)
        torch._dynamo.utils.counters.clear()
        with torch.autocast("cuda", torch.bfloat16):
            for seed in (3, 4, 5, 6):
                extra = (*rest, p, seed) if droppable else rest
                expected = results(op, tensors, dtypes, *extra)
                for a, b in zip(results(compiled, tensors, dtypes, *extra), expected):
                    assert a.dtype == b.dtype and torch.equal(a, b)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2

    @pytest.mark.parametrize("name", names)
    def test_bit_identical(self, name):
        """K6: a race, or a sum whose order depends on timing."""
        op, _, _, tensors, dtypes, rest = self.case(name, rows=4000)
        first = results(op, tensors, dtypes, *rest)
        for _ in range(3):
            again = results(op, tensors, dtypes, *rest)
            assert all(torch.equal(a, b) for a, b in zip(first, again))

    def test_attention_dropout_is_reproducible(self):
        """K8: a mask that depends on the generator's state, or that moves it, or that ignores the
        seed."""
        qkv, before = qkv_like(2, 256, 4, 128, device="cuda"), torch.cuda.get_rng_state()
        dtypes = (torch.bfloat16,)
        first, again, other = (results(model.attention, (qkv,), dtypes, 4, 0.1, 0.1, seed)
                               for seed in (5, 5, 6))
        assert all(torch.equal(a, b) for a, b in zip(first, again))
        assert not torch.equal(first[0], other[0])
        assert torch.equal(before, torch.cuda.get_rng_state())

    def test_offsets_past_2_to_31(self, monkeypatch):
        """K7: 32-bit row offsets, at 80,000 rows of 28,896 logits and 300,000 rows of 10,240
        columns."""
        monkeypatch.setitem(model.LAUNCH["cross_entropy"], "chunk_rows", 80_000)
        hidden = torch.randn(80_000, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(28_896, 64, device="cuda") / 8
        targets = torch.randint(0, 28_896, (80_000,), device="cuda")
        targets[:79_000] = -100  # only rows past 2^31 count

        def with_gradient(op, hidden, targets, weight=weight):
            loss = op(hidden, weight, targets)
            return loss.detach().double(), torch.autograd.grad(loss, hidden)[0].double()

        # The tail alone is another product for cuBLAS, so not bit-equal: compare errors in fp64.
        tail, last = hidden[79_000:].detach().requires_grad_(), targets[79_000:]
        loss, dhidden = with_gradient(model.cross_entropy, hidden, targets)
        assert (dhidden[:79_000] == 0).all()
        alone = with_gradient(model.cross_entropy, tail, last)
        exact = with_gradient(model.cross_entropy_ref, tail.detach().double().requires_grad_(),
                              last, weight.bfloat16().double())
        for got, other, e in zip((loss, dhidden[79_000:]), alone, exact):
            allowed = 2 * (other - e).abs().amax() + 1e-5 * e.abs().amax()
            assert (got - e).abs().amax() <= allowed
        x = torch.randn(300_000, 10_240, device="cuda", dtype=torch.bfloat16)
        zeros = torch.zeros(10_240, device="cuda")
        tail = x[-100:].clone()
        assert torch.equal(model.bias_gelu(x, zeros)[-100:], model.bias_gelu(tail, zeros))
        assert torch.equal(model.layer_norm(x, zeros + 1, zeros)[-100:],
                           model.layer_norm(tail, zeros + 1, zeros))


@slow
@pytest.mark.skipif(INTERPRETED or OLD_PAIR, reason="starts the interpreter itself")
def test_training_the_demo_in_the_interpreter(tmp_path):
    """Kernels that are right alone but wired wrongly into the model: the demo's losses differ."""
    assert run("data.py", "demo", "--out", tmp_path / "demo").returncode == 0
    losses = []
    for name, env in (("kernels", {"TRITON_INTERPRET": "1"}), ("reference", {})):
        out = tmp_path / name
        done = run("train.py", "--preset", "demo", "--data", tmp_path / "demo", "--out", out,
                   "--total_steps", 3, "--batch_tokens", 256, "--log_every", 1, "--lr", 0.01,
                   "--warmup_steps", 1, "--eval_tokens", 256, "--device", "cpu",
                   env={**env, "OMP_NUM_THREADS": "1"}, timeout=900)
        assert done.returncode == 0, done.stderr
        assert ("interpreter" in done.stdout) == (name == "kernels")
        rows = map(json.loads, (out / "log.jsonl").read_text().splitlines())
        losses.append([row.get("loss", row.get("val_loss")) for row in rows])
    assert len(losses[0]) == 5 and losses[0][0] != losses[0][-1]
    assert all(abs(a - b) <= 1e-5 for a, b in zip(*losses))
