"""Complex numbers in a loss: their arithmetic is fused, and a Fourier transform has one transform for a gradient."""

import pytest
import torch
from test_lowering import check, externs

from fused_losses import fuse

ALIASES = {"view_as_real", "view_as_complex", "reshape"}


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def arithmetic(x, y):
    z, w = torch.complex(x, y), torch.polar(y.abs() + 0.5, x)
    quotient = (z * w.conj() - 2j * z) / w + (x + 1) / (w - 1j) - z / 3
    return torch.view_as_real(quotient).sin().sum() + (z.sgn() * w.reciprocal()).real.sum()


def functions(x, y):
    z = torch.complex(x, y)
    return z.abs().log().sum() + (z.angle() * y).sum() + (z.exp() * z.log()).imag.sum() + (z**2 + z.square()).real.sum()


def moved(x, y):
    z = torch.stack([torch.complex(x, y).t(), torch.complex(y, x).t()], 1)
    z = torch.cat([z[1:], z[:2] * 1j]).flip(0).roll(1, 2)
    padded = torch.nn.functional.pad(z.flatten(1), (1, 2), value=2.0)
    chosen = torch.where(padded.real > 0, padded, 1 - 2j).masked_fill(padded.imag > 1, 3j)
    return chosen.sum(0).abs().sum() + z.mean((0, 2)).angle().sum()


def written(x, y):
    z = torch.zeros(x.shape, dtype=torch.complex128)
    z[:, 1:] = torch.complex(x, y)[:, :-1]
    z[:, 0] = x[:, 0]
    z[0] *= 2j
    return (z.to(torch.complex64) * (torch.complex(x, y) - torch.tensor([1j, 2.0]).sum())).abs().sum()


@pytest.mark.parametrize("loss", [arithmetic, functions, moved, written])
def test_arithmetic(loss):
    x, y = draw(5, 4), draw(5, 4, seed=1)
    assert externs(check(loss, x, y, wanted=(0, 1))) <= {"reshape"}
    leaves = [t.float().requires_grad_() for t in (x, y)]
    found, expected = (torch.autograd.grad(f(*leaves), leaves) for f in (fuse(loss, strict=True), loss))
    torch.testing.assert_close(found, expected)


def test_the_sign_of_0_is_0():
    x = torch.tensor([0.0, 3.0], requires_grad=True)
    loss = fuse(lambda x: (torch.complex(x, x) + 0).abs().sum(), strict=True)
    torch.testing.assert_close(torch.autograd.grad(loss(x), x)[0], torch.tensor([0, 2.0**0.5]))


def test_division_by_large_and_small_numbers():
    x = torch.tensor([1e-30, 1e30, 0.0], dtype=torch.float32)
    found = fuse(lambda x: torch.view_as_real(1 / torch.complex(x, 0.5 * x)), strict=True)(x)
    torch.testing.assert_close(found, torch.view_as_real(1 / torch.complex(x, 0.5 * x)), equal_nan=True)


SPECTRA = {
    "rfft": torch.fft.rfft,
    "longer": lambda x: torch.fft.rfft(x, 9),
    "shorter": lambda x: torch.fft.rfft(x, n=4, dim=0, norm="ortho"),
    "columns": lambda x: torch.fft.rfft(x, dim=0, norm="forward"),
    "planes": lambda x: torch.fft.rfft2(x, norm="ortho"),
    "resized": lambda x: torch.fft.rfftn(x, (5, 8)),
    "every": lambda x: torch.fft.rfftn(x, dim=(1, 0)),
    "stft": lambda x: torch.stft(x, 6, 2, window=torch.hann_window(6, dtype=x.dtype), return_complex=True),
}


def spectral(transform):
    return lambda x, y: (transform(x).abs() - transform(y).abs()).square().sum() + transform(x * y).angle().sum()


@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_gradient_of_a_transform_is_one_transform(name, size):
    """To real numbers, of half a spectrum: no zeros are transformed, and no imaginary parts are thrown away."""
    programs = check(spectral(SPECTRA[name]), draw(7, size), draw(7, size, seed=1), wanted=(0, 1))
    planes = {"_fft_c2c"} if name in ("planes", "resized", "every") else set()
    frames = {"unfold_backward"} if name == "stft" else set()
    assert externs(programs) == {"_fft_r2c", "_fft_c2r"} | planes | frames | externs(programs) & ALIASES


@pytest.mark.parametrize("transform", [torch.fft.irfft, torch.fft.fft, torch.fft.ihfft, torch.fft.hfft])
def test_other_transforms(transform):
    check(lambda x, y: torch.view_as_real(transform(x) * (1 + 0j)).sin().sum() + y.sum(), draw(4, 6), draw(4, 6))


def test_a_transform_in_kernels():
    """Both lengths have a frequency that stands for one; only the even one has a second."""
    loss = lambda x, y: (torch.fft.rfft(x).abs() - torch.fft.rfft(y, norm="ortho").abs()).square().mean()
    for size in (64, 63):
        x, y = (draw(40, size, seed=k, dtype=torch.float32).requires_grad_() for k in (0, 1))
        found, truth = fuse(loss, strict=True)(x, y), loss(x.double(), y.double())
        torch.testing.assert_close(*(torch.autograd.grad(value, [x, y]) for value in (found, truth)))


@pytest.mark.filterwarnings("ignore:.*runs as plain torch")
def test_complex_arguments_and_results_are_left_to_torch():
    z = torch.complex(draw(3), draw(3, seed=1))
    assert "complex" in fuse(lambda z: z.abs().sum()).explain(z).reason
    assert "complex" in fuse(lambda x: torch.complex(x, x)).explain(z.real).reason
