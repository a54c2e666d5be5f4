"""The fused ops of model.py against plain torch in fp64: the kernels in Triton's interpreter (fp32)
and, marked gpu, in bf16 on a CUDA device; the references; and kernels compiled for absent chips.

The interpreter is chosen when triton is imported. So the class TestInTheInterpreter runs in a child
process that has TRITON_INTERPRET=1, and the rest of this file here."""

import os
from itertools import product
from typing import NamedTuple
from unittest import mock

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad
from torch.utils._pytree import tree_leaves

triton = pytest.importorskip("triton")

from bench import SHARED_KB, needs, recorded_launches  # noqa: E402
from conftest import run  # noqa: E402

import model  # noqa: E402

OLD_PAIR = triton.__version__ < "3.7" and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0"
slow = pytest.mark.slow
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(),
                                           reason="needs a CUDA device")]


@pytest.mark.skipif(OLD_PAIR, reason="triton 3.6's interpreter doesn't run on numpy 2.4")
@pytest.mark.parametrize("tier", ["not slow", pytest.param("slow", marks=slow)])
def test_kernels_in_the_interpreter(tier):
    """Any wrong formula, mask or offset in a kernel: the tests of TestInTheInterpreter."""
    tests = f"{__file__}::TestInTheInterpreter"
    result = run("-m", "pytest", "-qx", tests, "-m", tier, env={"TRITON_INTERPRET": "1"})
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-4000:]


# ---------------------------------------------------------------------------------------------
# what to compare


class Case(NamedTuple):
    op: callable
    plain: callable  # the op in torch; in float64 it is right
    tensors: tuple
    rest: tuple = ()  # arguments after the tensors


NAMES = ["add_layer_norm", "bias_gelu", "cross_entropy", "attention"]


def rand(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def plain_loss(hidden, weight, targets, ignore_index):
    logits = hidden @ weight.to(hidden.dtype).T
    return F.cross_entropy(model.at_least_fp32(logits), targets, ignore_index=ignore_index)


def make_case(name, rows, width, n=2, p=0.0, dtype=torch.float32):
    """One op's case, with fp32 parameters and residual stream as under autocast. n: attention's
    heads, or the vocabulary. With dropout the references draw the kernels' masks. Three references
    are right where test_model.py finds Hugging Face's logits."""
    x = rand(rows, width, dtype=dtype)
    bias = rand(width, seed=1)
    seed = 2**31 - 8
    op = getattr(model, name)
    plain = getattr(model, f"{name}_ref")
    if name == "add_layer_norm":
        residual = 100 + rand(rows, width, seed=2)
        return Case(op, plain, (x, residual, 1 + rand(width), bias), (0.1, p, seed))
    if name == "bias_gelu":
        return Case(op, plain, (x, bias))
    if name == "cross_entropy":
        targets = 3 + 101 * torch.arange(rows) % (n - 3)
        targets[1::3] = 2  # every third is ignored
        return Case(op, plain_loss, (x, rand(n, width, seed=3), targets), (2,))
    qkv = rand(2, max(rows // 2, 3), 3 * width, dtype=dtype)
    return Case(op, plain, (qkv,), (n, 0.3, p, seed))


def strided(tensor):
    """The same values with gaps between them. What has rows may come so, a vector never does."""
    if tensor.is_floating_point() and tensor.dim() == 1:
        return tensor.clone()
    return torch.stack([tensor, tensor + 1], -1)[..., 0]


def results(case):
    """Outputs and every gradient of a case's op on copies of its tensors. Output gradients are
    random: with ones, LayerNorm's dx is 0 and a wrong formula would pass."""
    leaves = [strided(tensor) for tensor in case.tensors]
    wanted = [leaf.requires_grad_() for leaf in leaves if leaf.is_floating_point()]
    outputs = tree_leaves(case.op(*leaves, *case.rest))
    grads = [strided(rand(*o.shape, seed=5).bfloat16().to(o)) for o in outputs]
    return [t.detach() for t in (*outputs, *grad(outputs, wanted, grads))]


def check(case):
    """max|ours - fp64| <= 2 max|torch's own op in the same dtypes - fp64|, for outputs and
    gradients."""
    plain = case._replace(op=case.plain)
    doubles = [t.double() if t.is_floating_point() else t for t in case.tensors]
    exact = results(plain._replace(tensors=doubles))
    for i, (a, b, e) in enumerate(zip(results(case), results(plain), exact)):
        assert a.shape == e.shape
        # Where torch happens to be exact: less than a bf16 rounding, or a few fp32 ones at mean
        # 100, of the largest value.
        floor = 2**-10 if a.dtype == torch.bfloat16 else 1e-5
        allowed = 2 * (b - e).abs().amax() + floor * e.abs().amax()
        error = (a - e).abs().amax()
        assert error <= allowed, f"tensor {i}: error {error:.3g}, allowed {allowed:.3g}"


def check_compiled(device, tolerance, backend):
    """Three steps with dropout: compiled blocks train as eager ones do, and new seeds compile
    nothing anew."""
    torch._dynamo.reset()
    models = []
    for compiles in False, True:
        torch.manual_seed(1)
        gpt = model.GPT(model.GPTConfig(2, 2, 32, 16, 61, dropout=0.2)).to(device)
        optimizer = torch.optim.SGD(gpt.parameters(), lr=0.1)
        idx = torch.arange(16, device=device)[None]
        graphs = []  # compiled after each step
        for block in gpt.transformer.h:
            if compiles:
                block.compile(backend=backend)
        for _ in range(3):
            gpt(idx, idx)[1].backward()
            optimizer.step()
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        models.append(gpt)
    assert 0 < graphs[1] == graphs[2]  # the second seed may: it becomes a variable
    for a, b in zip(*(gpt.parameters() for gpt in models)):
        assert (a - b).abs().max() <= tolerance * a.abs().max()


# ---------------------------------------------------------------------------------------------
# in the interpreter


# In the interpreter an operation costs the same for a small tile as for a large one: so small tiles
# and few programs have all their edges in small tensors.


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in a child process")
class TestInTheInterpreter:
    @pytest.mark.parametrize("rows,width", [  # have all edges together; not every pair
        (1, 7), (3, 1), (5, 100), (3, 384), (1, 1000), (3, 1023), (3, 2560)])
    def test_norms_and_gelu_match_fp64(self, rows, width, monkeypatch):
        """A wrong dx, dγ or dβ, a lane outside the row in a sum, cancellation at mean 100; forward
        or backward with another dropout mask, rate or factor than the reference."""
        monkeypatch.setattr(model, "n_programs", lambda *_: 2)
        monkeypatch.setattr(model, "GELU_COLS", 64)
        for name, p in ("add_layer_norm", 0.0), ("add_layer_norm", 0.3), ("bias_gelu", 0.0):
            check(make_case(name, rows, width, p=p))

    @pytest.mark.parametrize("T,D,BM,BN,p", [
        (1, 16, 16, 16, 0.0), (32, 16, 16, 16, 0.0), (20, 10, 16, 16, 0.25),
        (32, 10, 16, 16, 0.25), (24, 16, 16, 8, 0.25), (24, 16, 8, 16, 0.25)])
    def test_attention_matches_fp64(self, T, D, BM, BN, p, monkeypatch):
        """Tiles at the diagonal and past the end, wide and high, padded head widths, head and batch
        offsets, the scale, a read past the end (NaN lies there); one of the three kernels with
        another dropout mask than the reference, heads or rows of the batch that share one."""
        monkeypatch.setattr(model, "attention_tile", lambda *_: (BM, BN, 4, 1))

        def op(qkv, *rest):
            beyond = torch.full_like(qkv[:1], torch.nan)
            return model.attention(torch.cat([qkv, beyond])[:-1], *rest)

        check(Case(op, model.attention_ref, (rand(2, T, 3 * 2 * D),), (2, 0.3, p, 3)))

    def test_cross_entropy_matches_fp64(self, monkeypatch):
        """The online softmax over blocks, chunk edges, ignored rows, the division by the count."""
        monkeypatch.setattr(model, "CROSS_ENTROPY_BLOCK", 64)
        monkeypatch.setattr(model, "CROSS_ENTROPY_CHUNK", 3)
        check(make_case("cross_entropy", 7, 16, 150))

    def test_cross_entropy_at_its_edges(self):
        """Overflow at logits of 1e4, gradient rows that don't sum to 0, a mean over no target (0
        with zero gradients, by our choice), a negative ignore_index read as an address."""
        hidden = (1e4 * rand(6, 32).sign()).requires_grad_()
        for targets in torch.arange(6), torch.full((6,), -100):
            loss = model.cross_entropy(hidden, torch.eye(32), targets)
            (dhidden,) = grad(loss, hidden)
            assert loss.isfinite() and dhidden.sum(1).abs().max() < 1e-6
        assert loss == 0 and (dhidden == 0).all()

    def test_no_grad_and_empty(self):
        """Other numbers under no_grad, a launch over an empty grid."""
        for name in NAMES:
            case = make_case(name, 4, 32, 8)
            with torch.no_grad():
                outputs = tree_leaves(case.op(*case.tensors, *case.rest))
            torch.testing.assert_close(outputs, results(case)[:len(outputs)], rtol=1e-6, atol=1e-6)
            results(make_case(name, 0, 32, 8))

    @slow  # half a minute of compiling
    def test_compiled_equals_eager(self):
        """A graph that goes on without an op's backward, or is made for each seed."""
        check_compiled("cpu", 0, "aot_eager")


# ---------------------------------------------------------------------------------------------
# without a kernel


def worst_deviation(p):
    """How far masks of neighbouring seeds are from independent draws, in standard deviations: their
    mean, the correlations of all 8,128 pairs of masks, and χ² of the sums, along a row or a column,
    of products of elements a lag apart. The model draws seeds from all 31 bits."""
    seeds = [*range(64), *range(2**31 - 64, 2**31)]
    masks = [model.dropout_ref(torch.ones(128, 512), p, seed) for seed in seeds]
    z = ((torch.stack(masks) > 0).float() - (1 - p)) / (p * (1 - p)) ** 0.5  # mean 0, variance 1
    pairs = z.flatten(1).corrcoef() * z[0].numel() ** 0.5
    found = [z.mean() * z.numel() ** 0.5, pairs.triu(1).abs().max()]
    for axis, lag in product((1, 2), (1, 2, 3, 5, 8)):
        squares = (z * z.roll(lag, axis)).sum(axis).square() / z.shape[axis]
        found.append((squares.mean() - 1) / squares.std() * squares.numel() ** 0.5)
    return max(map(abs, found))


def test_dropout_masks(monkeypatch):
    """A wrong rate or factor, in the kernels too; a mask that is no function of its seed; rows,
    columns or seeds that share one; a hash too weak: without its last product it must fail."""
    x, again = (model.dropout_ref(torch.ones(9, 100), 0.3, 7) for _ in range(2))
    assert torch.equal(x, again)
    assert torch.allclose(x.unique(), torch.tensor([0, 1 / 0.7]))
    assert worst_deviation(0.1) < 6 and worst_deviation(0.5) < 6
    element_hash = model.element_hash
    undo = pow(0x846CA68B, -1, 2**32)
    monkeypatch.setattr(model, "element_hash", lambda *at: element_hash(*at) * undo)
    assert worst_deviation(0.1) > 10


def test_references_match_fp64(monkeypatch):
    """A wrong formula on the path of a CPU, attention's written-out one included, which only
    dropout takes. Whole logits, or a mistake at a chunk's edge or at ignored rows."""
    for name in NAMES:
        case = make_case(name, 6, 32, 8)
        check(case)
    # attention, the last one, with a dropout so small that nothing is dropped
    check(case._replace(op=lambda qkv, *_: model.attention_ref(qkv, 8, 0.3, 1e-10)))
    chunks = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w: chunks.append(len(x)) or linear(x, w))
    monkeypatch.setattr(model, "CROSS_ENTROPY_CHUNK", 4)
    check(make_case("cross_entropy", 6, 32, 8))
    assert chunks == [2, 4, 4]  # backward makes all but the last again


def test_autocast_dtypes():
    """Activations that stay fp32 under autocast, twice as large, or a residual stream in bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        for name in NAMES:
            case = make_case(name, 4, 32, 8)
            first, *residual = tree_leaves(case.op(*case.tensors, *case.rest))
            assert (first.dtype == torch.bfloat16) == (name != "cross_entropy"), name
            assert all(o.dtype == torch.float32 for o in residual)


def test_kernels_run_where_they_can(monkeypatch):
    """A kernel launched on a T4, or on AMD's GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(model, "gpu", model.gpu.__wrapped__)  # without its cache
    for capability, hip, path in (((7, 5), None, "reference"), ((8, 6), None, "triton"),
                                  ((9, 0), "6.4", "reference")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)  # noqa: B023
        monkeypatch.setattr(torch.version, "hip", hip)
        assert model.kernels_active() == path


@pytest.mark.parametrize("device,n_in,n_out", [
    ("cpu", 6, 4), pytest.param("cuda", 2560, 7680, marks=gpu)])  # BioMedLM's c_attn
def test_weight_gradients_add_up_in_place(device, n_in, n_out):
    """The sum in another place than before: cloned, since DDP's bucket holds it too. A second
    backward that replaces the first. Sums that are rounded to bf16."""
    torch.manual_seed(0)
    layer = model.Linear(n_in, n_out, device=device)
    layer.accumulates = True
    bucket = layer.weight.grad = torch.zeros_like(layer.weight)
    dweight = dbias = 0
    for _ in range(2):
        x, dy = (torch.randn(4096, n, device=device).bfloat16() for n in (n_in, n_out))
        x.requires_grad_()
        with torch.autocast(device, torch.bfloat16):
            layer(x).backward(dy)
        dweight += dy.double().T @ x.detach().double()
        dbias += dy.double().sum(0)
    assert layer.weight.grad.data_ptr() == bucket.data_ptr()
    rounded = 2**-6
    for found, exact, limit in (  # on a CPU the product is in bf16
            (layer.weight.grad, dweight, 1e-4 if x.is_cuda else rounded),
            (layer.bias.grad, dbias, 1e-5),
            (x.grad, dy.double() @ layer.weight.double(), rounded)):
        assert (found - exact).abs().max() <= limit * exact.abs().max()


def test_products_on_a_gpu(monkeypatch):
    """On a GPU: operands swapped, a sum rounded to bf16 or put elsewhere than into `total`."""
    a, b, total = mock.Mock(is_cuda=True), mock.Mock(), mock.Mock()
    monkeypatch.setattr(torch, "mm", mock.Mock())
    monkeypatch.setattr(torch, "addmm", mock.Mock())
    model.add_product(None, a, b)
    torch.mm.assert_called_once_with(a, b, out_dtype=torch.float32)
    model.add_product(total, a, b)
    torch.addmm.assert_called_once_with(total, a, b, out_dtype=torch.float32, out=total)


# ---------------------------------------------------------------------------------------------
# cross-compiled for chips that are not here


def assert_fits(kernel, arguments, target):
    found = needs(kernel, arguments, target)
    assert found["shared_kb"] <= SHARED_KB[target], f"shared memory: {found}"
    # triton 3.6 keeps one register pair of dK/dV's on the stack, and is fastest at that tile
    most = 8 if triton.__version__ < "3.7" and kernel is model.attention_dkv_kernel else 0
    assert found["stack"] <= most, f"spills: {found}"
    if target == "sm_90" and arguments.get("BM", 0) >= 64:
        assert found["wgmma"], f"matrix products are not wgmma: {found}"


@slow  # the fast tier compiles one kernel, below
@pytest.mark.parametrize("target,C,n_head", [
    *((target, 2560, 20) for target in SHARED_KB),
    ("sm_80", 768, 12), ("sm_90", 768, 12), ("sm_86", 512, 2)])
def test_kernels_cross_compile(target, C, n_head):
    """A kernel that only the interpreter accepts; registers spilled; more shared memory than the
    chip has; attention off the tensor cores' fast path on Hopper."""
    launches = recorded_launches(target, C, n_head)
    assert len({kernel for kernel, _ in launches}) == 8  # every kernel of model.py
    for launch in launches:
        assert_fits(*launch, target)


def test_a_spilling_kernel_is_caught():
    """The check above gone blind: attention at twice the tile and half the threads a row must fail
    it, where its own settings pass."""
    launches = dict(recorded_launches("sm_90", 256, 2))  # BioMedLM's head width, few heads
    kernel = model.attention_forward_kernel
    assert_fits(kernel, launches[kernel], "sm_90")
    wide = {**launches[kernel], "BM": 128, "BN": 64, "num_warps": 4}
    with pytest.raises(AssertionError, match="spills"):
        assert_fits(kernel, wide, "sm_90")


# ---------------------------------------------------------------------------------------------
# on a GPU


class TestOnGPU:
    pytestmark = gpu

    def case(self, name, rows, width, n, p=0.0):
        case = make_case(name, rows, width, n, p, torch.bfloat16)
        return case._replace(tensors=[t.cuda() for t in case.tensors])

    @pytest.mark.parametrize("width,heads", [(2560, 20), (768, 12), (1000, 10), (512, 2)])
    @pytest.mark.parametrize("name", NAMES)
    def test_bf16_error(self, name, width, heads):
        """A kernel less exact in bf16 than torch's own op, at BioMedLM's vocabulary too."""
        check(self.case(name, 300, width, 28_896 if name == "cross_entropy" else heads))

    def test_masks_are_the_references(self):
        """A kernel on the GPU that draws other dropout masks than its reference."""
        x = torch.ones(300, 1000, device="cuda")
        zeros = torch.zeros_like(x)
        _, new = model.add_layer_norm(x, zeros, x[0], zeros[0], 1e-5, 0.3, 7)
        assert torch.equal(new, model.dropout_ref(x, 0.3, 7))
        # Queries and keys of 0 see all tokens alike. With the unit matrix as values, row i of the
        # output is the row of probabilities.
        qkv = torch.zeros(2, 64, 3, 2, 64, device="cuda", dtype=torch.bfloat16)
        qkv[:, :, 2] = torch.eye(64)[:, None]
        args = (qkv.flatten(2), 2, 1.0, 0.3, 7)
        assert torch.equal(model.attention(*args) != 0, model.attention_ref(*args) != 0)

    def test_compiled_equals_eager(self):
        """The same by inductor, in bf16."""
        with torch.autocast("cuda", torch.bfloat16):
            check_compiled("cuda", 2**-6, "inductor")

    @pytest.mark.parametrize("p", [0.0, 0.1])
    @pytest.mark.parametrize("name", NAMES)
    def test_bit_identical(self, name, p):
        """A race, or a sum whose order depends on timing; a mask that depends on the generator's
        state, or that moves it."""
        case = self.case(name, 4000, 2560, 20, p)
        before = torch.cuda.get_rng_state()
        first, *again = (results(case) for _ in range(4))
        assert all(torch.equal(a, b) for other in again for a, b in zip(first, other))
        assert torch.equal(before, torch.cuda.get_rng_state())

    def test_logits_past_2_to_31(self, monkeypatch):
        """32-bit row offsets, at 80,000 rows of 28,896 logits in one chunk."""
        case = self.case("cross_entropy", 80_000, 64, 28_896)
        small = results(case)
        monkeypatch.setattr(model, "CROSS_ENTROPY_CHUNK", 80_000)
        for a, b in zip(results(case), small):
            assert (a - b).abs().max() <= 2**-6 * b.abs().max()

    def test_rows_past_2_to_31(self):
        """32-bit row offsets, at 300,000 rows of 10,240 columns."""
        x = torch.randn(300_000, 10_240, device="cuda", dtype=torch.bfloat16)
        tail = x[-100:].clone()
        zeros = torch.zeros(10_240, device="cuda")
        assert torch.equal(model.bias_gelu(x, zeros)[-100:], model.bias_gelu(tail, zeros))
        # One by one: each tensor is 6 or 12 GB.
        y = model.add_layer_norm(x, x, zeros + 1, zeros)[0][-100:].clone()
        assert torch.equal(y, model.add_layer_norm(tail, tail, zeros + 1, zeros)[0])
