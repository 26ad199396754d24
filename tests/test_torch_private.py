"""torch's private names are used in one file, and each may be missing."""

import ast
from pathlib import Path

import pytest
import torch
import torch.fx
from pyro.distributions import Beta, Gamma
from pyro.infer.autoguide import AutoNormal

import vi_toolkit as vi
from tests.models import regression, regression_data
from vi_toolkit import torch_private
from vi_toolkit.programs.noise import FunctionalNoise, RecordNoise, UnsupportedNoise
from vi_toolkit.programs.vectorise import Batched, Unchecked

PACKAGE = Path(torch_private.__file__).parent
PRIVATE_MODULES = ("torch.fx.experimental",)
# Objects of torch that the toolkit handles: their private attributes are torch's.
OBJECTS = [
    torch.Tensor,
    torch.UntypedStorage,
    torch.Generator,
    torch.optim.Optimizer,
    torch.fx.Node,
    torch.fx.Graph,
    torch.ops.aten.add.Tensor,
    torch.distributions.Beta(1.0, 1.0),
    torch.distributions.Categorical(torch.ones(2)),
    torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2)),
]
# Python's own, or a name that the toolkit's classes have as well.
SHARED = {"_replace", "_asdict", "_fields", "_values"}


def is_private(name):
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def dotted(node):
    if isinstance(node, ast.Attribute):
        return [*dotted(node.value), node.attr]
    return [node.id] if isinstance(node, ast.Name) else []


def private_names(source):
    """(line, name) of every private name of torch in a module's source."""
    tree = ast.parse(source)
    own = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            path = dotted(node)
            if path and path[0] in ("torch", "aten"):
                names = [".".join(["torch", *path[1:]])]
            elif is_private(node.attr) and path[:1] not in (["self"], ["cls"]):
                torchs = any(hasattr(thing, node.attr) for thing in OBJECTS)
                if torchs and node.attr not in own | SHARED:
                    yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value] if " " not in node.value else []
        for name in names:
            parts = name.split(".")
            if parts[0] == "torch" and (
                any(map(is_private, parts)) or name.startswith(PRIVATE_MODULES)
            ):
                yield node.lineno, name


def test_no_other_file_uses_a_private_name():
    found = [
        f"{path.relative_to(PACKAGE)}:{line} {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "torch_private.py"
        for line, name in private_names(path.read_text("utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import torch._inductor",
        "from torch._inductor.config import patch",
        "from torch.utils import _pytree",
        "from torch.fx.experimental.proxy_tensor import make_fx",
        "torch._C._aoti.run()",
        "aten._to_copy.default",
        "x.data._version",
        "x.untyped_storage()._cdata",
        "logging.getLogger('torch._inductor')",
    ],
)
def test_private_names_are_recognised(source):
    assert list(private_names(source))


@pytest.mark.parametrize("name", sorted(torch_private._NAMES))
def test_this_version_of_torch_has_every_name(name):
    assert getattr(torch_private, name) is not None


@pytest.fixture
def without(monkeypatch):
    """Makes torch lose a private name."""

    def lose(name):
        module, _, lost = torch_private._NAMES[name]
        monkeypatch.setitem(torch_private._NAMES, name, (module, "no_such_name", lost))
        if name in vars(torch_private):
            monkeypatch.delattr(torch_private, name)

    yield lose
    # ``optional`` may have stored None.
    for name in torch_private._NAMES:
        if vars(torch_private).get(name, ...) is None:
            delattr(torch_private, name)


def test_without_a_name_that_compiling_needs_the_fit_is_eager(without):
    without("make_fx")
    options = {"optimizer": 0.02, "progress": False}
    with pytest.raises(vi.CompileError, match=r"torch .* has no torch\.fx\.experimental"):
        vi.fit(regression, AutoNormal, regression_data(), steps=20, compile=True, **options)
    eager = vi.fit(regression, AutoNormal, regression_data(), steps=20, **options)
    assert len(eager.elbo) == 20


def test_without_the_gamma_sampler_noise_cannot_be_fixed(without):
    RecordNoise()
    without("standard_gamma")
    with pytest.raises(UnsupportedNoise, match="the base noise of a guide cannot be held fixed"):
        RecordNoise()


def test_without_the_dirichlet_sampler_sites_are_drawn_one_by_one(without):
    import pyro

    def draw(_):
        with FunctionalNoise():
            return pyro.sample("x", Beta(2.0, 3.0))

    fast = Batched(draw, random=True)
    assert len(set(fast(torch.zeros(9)).tolist())) == 9 and fast.vectorises
    without("sample_dirichlet")
    slow = Batched(draw, random=True)
    with pytest.warns(UserWarning, match="drawn one draw at a time"):
        draws = slow(torch.zeros(9))
    assert len(set(draws.tolist())) == 9 and not slow.vectorises


def test_without_the_question_of_distributions_their_checks_stay(without):
    without("is_all_true")
    with pytest.warns(UserWarning, match="evaluated one draw at a time"):
        checks = Unchecked()
    with checks, pytest.raises(ValueError, match="found invalid values"):
        Gamma(-1.0, 1.0, validate_args=True)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        torch_private.nothing  # noqa: B018
