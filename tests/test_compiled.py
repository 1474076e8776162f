"""The compiled path of the subnetwork optimizers against torch's, and the forms of a selection."""

import os
import signal
import threading

import numpy as np
import pytest
import torch

from rlsparse import masks
from rlsparse.errors import ConfigError
from rlsparse.kernels import parallel
from rlsparse.kernels.packing import KERNELS
from rlsparse.subnetwork import SubnetworkAdamW, SubnetworkMask, SubnetworkSGD
from rlsparse.subnetwork.selection import BITMAP_FROM, Selection

NARROW = torch.bfloat16
ADAM = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
BIG = 2**21 + 77  # several pieces in each form


def chosen(size: int, form: str) -> np.ndarray:
    draw = np.random.default_rng(size)
    density = {"index": BITMAP_FROM / 2, "bitmap": 0.4, "whole": 1.1, "rows": 0.4}[form]
    if form == "rows":
        return np.repeat(draw.random(-(-size // 300)) < density, 300)[:size]
    mask = draw.random(size) < density
    mask[-1] = form != "index" or size > 50  # the end is where kernels go wrong
    return mask


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(INTEGERS[tensor.element_size()])


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


# --- take, put, add --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, NARROW, torch.float16, torch.float64])
@pytest.mark.parametrize("form", ["index", "bitmap", "whole", "rows"])
@pytest.mark.parametrize("size", [1, 63, 64, 65, 129, 5000, BIG])
def test_elements_are_taken_and_put_back_and_nothing_else_is_touched(
    size, form, dtype, three_threads
):
    """The oracle is a boolean index; around the tensor lie bits that must stay."""
    mask = chosen(size, form)
    selection = Selection(masks.pack(mask), size)
    inside = torch.from_numpy(mask)
    integer = INTEGERS[dtype.itemsize]
    around = torch.randint(-100, 100, (size + 200,), dtype=integer)  # NaNs and subnormals
    before, flat = around.clone(), around[100:-100].view(dtype)
    taken = selection.take(flat)
    assert torch.equal(bits_of(taken), before[100:-100][inside])
    new = torch.randint(-100, 100, (selection.size,), dtype=integer)
    version = flat._version
    selection.put(flat, new.view(dtype))
    assert flat._version > version
    before[100:-100][inside] = new
    assert torch.equal(around, before)


@pytest.mark.parametrize("dtype", [torch.float32, NARROW, torch.float16])
@pytest.mark.parametrize("form", ["index", "bitmap", "whole"])
@pytest.mark.parametrize("alpha", [1, 0.3])
def test_gradients_are_added_with_the_bits_of_torch(form, dtype, alpha):
    size = 5003
    mask = chosen(size, form)
    selection, inside = Selection(masks.pack(mask), size), torch.from_numpy(mask)
    exponents = torch.randint(-40, 20, (2, size))
    first, second = (torch.randn(2, size) * torch.exp2(exponents)).to(dtype)
    second[::17], first[::19] = torch.inf, -first[::19].nan_to_num()
    elements = first[inside].clone()
    selection.add(elements, second, alpha)
    expected = first[inside].add(second[inside], alpha=alpha)
    assert torch.equal(bits_of(elements), bits_of(expected))


def test_a_gradient_that_is_not_contiguous_is_taken_as_it_is():
    selection = Selection(masks.pack(chosen(640, "bitmap")), 640)
    inside = torch.from_numpy(chosen(640, "bitmap"))
    for flat in (torch.arange(1280.0)[::2], torch.ones(1).expand(640)):
        assert torch.equal(selection.take(flat), flat[inside])
        elements = torch.zeros(selection.size)
        selection.add(elements, flat)
        assert torch.equal(elements, flat[inside])


def test_bytes_of_each_form():
    for form, size_bytes in (("bitmap", 8 * -(-BIG // 64)), ("whole", 0)):
        assert Selection(masks.pack(chosen(BIG, form)), BIG).size_bytes == size_bytes
    few = chosen(BIG, "index")
    assert Selection(masks.pack(few), BIG).size_bytes == 4 * few.sum()


# --- updates ---------------------------------------------------------------------------------


def odd_values(size: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Of all sizes that fp32 has, subnormal to huge; zeros of both signs."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=draw)
    some = torch.randint(-149, 120, (size,), generator=draw).float()
    values = torch.where(torch.rand(size, generator=draw) < 0.5, values * torch.exp2(some), values)
    values[torch.rand(size, generator=draw) < 0.1] = 0.0
    values[torch.rand(size, generator=draw) < 0.02] = -0.0
    return values.to(dtype)


def pair(ours, size, form, dtype, in_fp32, settings):
    """The same weight under both paths."""
    found = []
    for path in ("torch", "compiled"):
        model = torch.nn.ParameterDict({"w": odd_values(size, 0, dtype)})
        mask = SubnetworkMask({"w": ((size,), masks.pack(chosen(size, form)))})
        optimizer = ours(model, mask, **settings, in_fp32=in_fp32, path=path)
        found.append((model["w"], optimizer))
    return found


def set_state(one, other) -> None:
    """Weight and state of ``other`` become those of ``one``."""
    (weight, optimizer), (its_weight, its_optimizer) = one, other
    with torch.no_grad():
        its_weight.copy_(weight)
    its_optimizer.load_state_dict(optimizer.state_dict())


def assert_near(own, expected, *before: torch.Tensor) -> None:
    """NaNs and infinities alike, else 2 ULP of the largest of the values before and after.

    It may be 8 where the change outweighs the value: torch's square roots (MKL) are not always
    those that are nearest, on some processors one in five is the next one.
    """
    own, expected = own.detach().float(), expected.detach().float()
    assert torch.equal(own.isnan(), expected.isnan())
    infinite = expected.isinf()
    assert torch.equal(own[infinite], expected[infinite])
    largest = torch.stack([expected.abs(), *(one.float().abs() for one in before)]).amax(0)
    ulp = (largest.nextafter(torch.tensor(torch.inf)) - largest).double()
    off = (own.double() - expected.double()).abs() / ulp.nan_to_num(posinf=2.0**104)
    off = off[expected.isfinite()]
    assert off.max() <= 8
    is_outweighed = torch.ones_like(infinite)
    for one in before:
        is_outweighed &= (expected - one).abs() >= one.abs() / 2
    assert not (off > 2)[~is_outweighed[expected.isfinite()]].any()


def assert_same(own, expected, *before: torch.Tensor) -> None:
    """Equal, NaNs too; the sign of a zero may differ."""
    own, expected = own.detach(), expected.detach()
    assert torch.equal(own.isnan(), expected.isnan())
    assert torch.equal(own.nan_to_num(0.5), expected.nan_to_num(0.5))


def nearest_roots(self: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.sqrt(self.detach().numpy()))


RULES = [
    (SubnetworkAdamW, ADAM),
    (SubnetworkAdamW, {**ADAM, "betas": (0.3, 0.999), "weight_decay": 0.0}),
    (SubnetworkAdamW, {**ADAM, "betas": (0.0, 0.9), "eps": 1e-30}),
    (SubnetworkSGD, {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}),
    (SubnetworkSGD, {"lr": 1e-2, "momentum": 0.5}),
]


@pytest.mark.parametrize("form", ["index", "bitmap", "whole"])
@pytest.mark.parametrize(
    ("dtype", "in_fp32"), [(torch.float32, "masters"), (NARROW, "masters"), (NARROW, "moments")]
)
@pytest.mark.parametrize(("ours", "settings"), RULES)
@pytest.mark.parametrize("roots", ["nearest", "torch"])
def test_a_step_stays_within_two_ulp_of_torch(
    ours, settings, dtype, in_fp32, form, roots, monkeypatch
):
    """Each step begins with the same weight and state; gradients up to infinity and NaN.

    Where torch has the nearest square roots, as the kernels do, the values are torch's.
    """
    near = assert_near
    if roots == "nearest":
        monkeypatch.setattr(torch.Tensor, "sqrt", nearest_roots)
        near = assert_same
    size = 20_011
    reference, mine = pair(ours, size, form, dtype, in_fp32, settings)
    inside = torch.from_numpy(chosen(size, form))
    for step in range(4):
        gradient = odd_values(size, step + 1, dtype)
        if step == 2:
            for place, odd in enumerate((torch.inf, -torch.inf, torch.nan)):
                gradient[place::23] = odd
        before = [weight.detach().clone() for weight, _ in (reference, mine)]
        state = reference[1].state[reference[0]].items()
        old = {k: v.clone() for k, v in state if isinstance(v, torch.Tensor)}
        for weight, optimizer in (reference, mine):
            weight.grad = gradient.clone()
            optimizer.step()
        expected, state = reference[1].state[reference[0]], mine[1].state[mine[0]]
        assert expected.keys() == state.keys()
        packed = gradient[inside]
        for name in expected.keys() - {"step", "master"}:
            # The first moment may be a small difference of large numbers.
            near(state[name], expected[name], *([packed] if name != "exp_avg_sq" else []),
                        *([old[name]] if name in old else []))  # fmt: skip
        outside = ~inside
        assert torch.equal(bits_of(mine[0])[outside], bits_of(before[1])[outside])
        if in_fp32 == "masters":
            master = state["master"] if dtype is NARROW else mine[0][inside]
            same = expected["master"] if dtype is NARROW else reference[0][inside]
            was = old.get("master", before[0][inside])
            near(master, same, was)
            if dtype is NARROW:
                assert torch.equal(mine[0][inside].isnan(), master.isnan())
                rounded = master.to(NARROW).nan_to_num(0.5)
                assert torch.equal(bits_of(mine[0][inside].nan_to_num(0.5)), bits_of(rounded))
        else:
            own, theirs = (w.detach()[inside].float() for w, _ in (mine, reference))
            assert torch.equal(own.isnan(), theirs.isnan())
            differ = (own != theirs) & ~own.isnan()
            assert differ.float().mean() < 0.01  # a tie, rounded to the other side
            low, high = own[differ].abs(), theirs[differ].abs()
            assert (low - high).abs().le(2**-7 * torch.maximum(low, high)).all()
        set_state(reference, mine)


@pytest.mark.parametrize("form", ["index", "bitmap", "whole"])
@pytest.mark.parametrize(("dtype", "in_fp32"), [(torch.float32, "masters"), (NARROW, "moments")])
def test_the_bits_do_not_depend_on_the_number_of_threads(form, dtype, in_fp32, three_threads):
    ends = []
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        _, (weight, optimizer) = pair(SubnetworkAdamW, BIG, form, dtype, in_fp32, ADAM)
        for step in range(2):
            weight.grad = odd_values(BIG, step + 1, dtype)
            optimizer.step()
        ends.append(bits_of(weight).clone())
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], bits_of(odd_values(BIG, 0, dtype)))


def test_a_run_of_one_path_may_go_on_with_the_other():
    """Many steps: the paths stay together, and the number of steps is carried over."""
    reference, mine = pair(SubnetworkAdamW, 5000, "bitmap", torch.float32, "masters", ADAM)
    for weight, _ in (reference, mine):
        weight.detach().copy_(torch.linspace(0.5, 2, 5000))
    for step in range(20):
        if step in (5, 10):
            reference[1].load_state_dict(mine[1].state_dict())
        for weight, optimizer in (reference, mine):
            weight.grad = torch.sin(torch.arange(5000.0) * (step + 1))
            optimizer.step()
    assert mine[1].state[mine[0]]["step"] == reference[1].state[reference[0]]["step"] == 20
    assert torch.allclose(mine[0], reference[0], rtol=1e-6, atol=0)
    assert (mine[0] - torch.linspace(0.5, 2, 5000)).abs().max() > 0.01


def test_autograd_sees_that_a_weight_was_written():
    _, (weight, optimizer) = pair(SubnetworkAdamW, 64, "bitmap", torch.float32, "masters", ADAM)
    later = weight.square().sum()
    weight.grad = torch.ones(64)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        later.backward()


# --- who computes ----------------------------------------------------------------------------


def test_auto_leaves_to_torch_what_kernels_cannot_do():
    """Half floats, state in the format of the weights, SGD without momentum: torch's bits."""
    for dtype, in_fp32, ours, settings in (
        (torch.float16, "masters", SubnetworkAdamW, ADAM),
        (NARROW, "nothing", SubnetworkAdamW, ADAM),
        (torch.float32, "masters", SubnetworkSGD, {"lr": 0.1}),
    ):
        ends = []
        for path in ("torch", "auto"):
            model = torch.nn.ParameterDict({"w": torch.linspace(-1, 1, 100).to(dtype)})
            mask = SubnetworkMask({"w": ((100,), masks.pack(chosen(100, "bitmap")))})
            optimizer = ours(model, mask, **settings, in_fp32=in_fp32, path=path)
            model["w"].grad = torch.linspace(1, 2, 100).to(dtype)
            optimizer.step()
            ends.append(bits_of(model["w"]))
        assert torch.equal(*ends)
        _, mine = pair(ours, 100, "bitmap", dtype, in_fp32, settings)
        before = bits_of(mine[0]).clone()
        mine[0].grad = torch.ones(100, dtype=dtype)
        with pytest.raises(ConfigError, match=f"'compiled' does not train w, {dtype} on cpu"):
            mine[1].step()
        assert torch.equal(bits_of(mine[0]), before)


def test_a_path_that_there_is_not_is_refused():
    model = torch.nn.ParameterDict({"w": torch.ones(8)})
    mask = SubnetworkMask({"w": ((8,), np.ones(1, np.uint8))})
    with pytest.raises(ConfigError, match="path is 'fast'; give one of auto, torch, compiled"):
        SubnetworkAdamW(model, mask, path="fast")


def test_auto_is_compiled_where_it_can_be(monkeypatch):
    """Without a kernel there is no update."""
    model = torch.nn.ParameterDict({"w": torch.ones(64)})
    mask = SubnetworkMask({"w": ((64,), masks.pack(chosen(64, "bitmap")))})
    optimizer = SubnetworkAdamW(model, mask, **ADAM)
    model["w"].grad = torch.ones(64)
    monkeypatch.setattr("rlsparse.kernels.parallel.run", lambda calls, num_threads: None)
    optimizer.step()
    assert torch.equal(model["w"], torch.ones(64))


# --- threads ---------------------------------------------------------------------------------


def test_calls_are_made_once_each_on_as_many_threads_as_are_given():
    everybody, made = threading.Barrier(3, timeout=60), []

    def call(number: int) -> None:
        everybody.wait()  # passes only if three are here
        made.append((number, threading.get_ident()))

    parallel.run([lambda n=number: call(n) for number in range(3)], 3)
    assert sorted(number for number, _ in made) == [0, 1, 2]
    assert len({thread for _, thread in made}) == 3
    own: list[int] = []
    parallel.run([lambda: own.append(threading.get_ident())] * 9, 1)
    assert own == [threading.get_ident()] * 9


def test_a_failing_call_is_told():
    def fail() -> None:
        raise ZeroDivisionError

    for num_threads in (1, 2):
        with pytest.raises(ZeroDivisionError):
            parallel.run([fail] * 4, num_threads)


def test_threads_are_made_anew_after_a_fork():
    def count() -> int:
        done: list[int] = []
        parallel.run([lambda: done.append(1)] * 64, 2)
        return len(done)

    assert count() == 64
    child = os.fork()
    if not child:
        signal.alarm(60)  # ends it, should it wait for threads that are not there
        os._exit(count() != 64)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_every_kernel_compiles():
    """Those of forms and formats that no other test meets, too."""
    assert len(KERNELS) == 3 * (2 * 4 + 2 + 2 * 3)
    for maker in KERNELS.values():
        function, signature = maker()
        assert callable(function)
        assert len(signature.args) in (7, 11)
