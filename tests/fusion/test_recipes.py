"""What generated sources are known by: it differs wherever anything does that they are made of."""

import ast
import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from fused_losses import fuse
from fused_losses.fusion import compiler, cpp, recipes
from fused_losses.fusion.ir import Expression, Extern, Stage
from fused_losses.fusion.lowering import lower_at_once
from fused_losses.fusion.sizes import Assumptions
from fused_losses.fusion.tracing import trace

FOLDER = Path(recipes.__file__).parent


def everything(x, labels, matrix):
    """A lookup, positions that may lie outside, a choice, numbers, sums, a cumulative one, and an operator of torch."""
    picked = x.log_softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
    differences = torch.nn.functional.pad(x, (1, 0)).diff(dim=1).flip(0)
    chosen = torch.where(differences > 0.5, differences.cumsum(1), -2 * differences)
    return (picked * chosen[:, ::2].amax(1)).sum() + (x @ matrix).abs().mean()


def program_of(loss, *tensors):
    given = trace(lambda given, tracer: loss(*given), tensors, Assumptions(), [t.is_floating_point() for t in tensors])
    return lower_at_once(given)


def program():
    return program_of(everything, torch.randn(5, 8), torch.randint(8, (5,)), torch.randn(8, 3))


def changed(value):
    """The value with any one part of it changed, wherever it is."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, float(value), -value - 1)
    elif isinstance(value, float):
        yield from (value + 1, -value)
    elif isinstance(value, str):
        yield value + "_"
    elif isinstance(value, torch.dtype):
        yield torch.float64 if value is torch.float32 else torch.float32
    elif value is None:
        yield 1
    elif isinstance(value, (tuple, list)):
        make = type(value)._make if hasattr(value, "_make") else type(value)
        yield from (
            make([*value[:k], other, *value[k + 1 :]]) for k, part in enumerate(value) for other in changed(part)
        )
        if value and make is type(value):
            yield value[:-1]
    elif isinstance(value, dict):
        yield value | {"another": 1}
    elif isinstance(value, Expression):
        yield from changed_expressions(value)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            for other in changed(getattr(value, field.name)):
                yield dataclasses.replace(value, **{field.name: other})
    else:
        yield f"another {value}"


def changed_expressions(root):
    """The expression with one of its nodes changed, or one that is shared made two."""
    for node in root.nodes:
        own: list = [("dtype", node.dtype)]
        if node.children == node.arguments:  # a load alone looks at computed indices
            own.append(("op", node.op))
        own += [(name, value) for name, value in node.attributes if not holds_expressions(value)]
        for name, value in own:
            for other in changed(value):
                yield rebuilt(root, node, name, other)
        if len(node.arguments) > 1:
            yield rebuilt(root, node, "arguments", node.arguments[::-1])


def holds_expressions(value):
    return isinstance(value, tuple) and any(isinstance(item, Expression) for item in value)


def rebuilt(root, changed_node, name, other):
    done = {}

    def new(value):
        if isinstance(value, Expression):
            return done[value]
        return tuple(map(new, value)) if type(value) is tuple else value

    for node in root.nodes:
        fields = {"op": node.op, "dtype": node.dtype, "arguments": node.arguments}
        attributes = dict(node.attributes)
        if node is changed_node:
            (fields if name in fields else attributes)[name] = other
        fields["arguments"] = new(fields["arguments"])
        done[node] = Expression(**fields, attributes=tuple((key, new(value)) for key, value in attributes.items()))
    return done[root]


def test_whatever_changes_in_a_program_changes_its_recipe():
    whole = program()
    ops = {node.op for step in whole.steps if isinstance(step, Stage) for node in step.expression.nodes}
    assert {"load", "checked", "index", "cumulated", "where", "constant", "cast"} <= ops
    assert any(isinstance(step, Extern) for step in whole.steps)
    own, others = recipes.recipe(whole, ()), list(changed(whole))
    assert len(others) > 1000
    for other in others:
        assert recipes.recipe(other, ()) != own, other


def test_forms_have_recipes_of_their_own():
    whole = program()
    forms = [(cpp.Form(split, rows),) for split in (True, False) for rows in ((True,), (False,), (True, False))]
    assert len({recipes.recipe(whole, form) for form in forms}) == len(forms)


def test_a_node_that_is_shared_is_not_two_that_are_equal():
    x = Expression("constant", torch.float32, (), (("value", 1.0),))
    y = dataclasses.replace(x)
    whole = program()
    (stage, *_) = [step for step in whole.steps if isinstance(step, Stage)]

    def recipe_of(*arguments):
        expression = Expression("add", torch.float32, arguments)
        return recipes.recipe(
            dataclasses.replace(whole, steps=(dataclasses.replace(stage, expression=expression),)), ()
        )

    assert recipe_of(x, x) == recipe_of(y, y) != recipe_of(x, y)


def test_a_trace_has_the_same_recipe_again():
    assert recipes.recipe(program(), ()) == recipes.recipe(program(), ())


def test_numbers_that_compare_equal_are_told_apart():
    nan, whole = float("nan"), program()
    numbers = [0, 0.0, -0.0, 1, 1.0, True, nan, float("inf")]
    assert len({recipes.recipe(whole, number) for number in numbers}) == len(numbers)


def test_every_module_that_makes_a_text_is_part_of_its_recipe(tmp_path):
    waiting, reached = ["cpp"], set()
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            tree = ast.parse((FOLDER / f"{name}.py").read_text())
            imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
            assert all(node.level == 1 for node in imports), f"{name} takes something from outside the folder"
            waiting += [
                part for node in imports for part in ([node.module] if node.module else [a.name for a in node.names])
            ]
    assert {"cpp", "passes", "nest", "body", "loads", "results", "schedule", "expressions"} <= reached
    copy = tmp_path / "fusion"
    shutil.copytree(FOLDER, copy)
    digests = {recipes.generator(copy)}
    assert digests == {recipes.generator()}
    for name in reached:
        recipes.generator.cache_clear()
        (copy / f"{name}.py").write_text((copy / f"{name}.py").read_text() + "\n")
        digests.add(recipes.generator(copy))
    assert len(digests) == len(reached) + 1


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("FUSED_LOSSES_CACHE", str(folder))
    return folder


def squares(x):
    return x.square().mean()


def gradient_of(loss):
    x = torch.arange(5.0, requires_grad=True)
    return torch.autograd.grad(loss(x), x)[0]


def test_what_is_known_is_not_written_again(cache, monkeypatch):
    expected = gradient_of(fuse(squares, strict=True))

    def text(self, forms):
        raise AssertionError("it is known")

    monkeypatch.setattr(cpp.Source, "text", text)
    torch.testing.assert_close(gradient_of(fuse(squares, strict=True)), expected)


@pytest.mark.parametrize("harm", ["library gone", "library damaged", "link damaged"])
def test_a_link_to_nothing_whole_is_made_again(cache, harm):
    expected = gradient_of(fuse(squares, strict=True))
    (library,), (link,) = cache.glob("*.so"), cache.glob("*.recipe")
    library.unlink()
    if harm == "library damaged":
        library.write_bytes(b"half")
    if harm == "link damaged":
        link.unlink()
        link.write_bytes(b"no library")
    torch.testing.assert_close(gradient_of(fuse(squares, strict=True)), expected)
    assert link.is_symlink() and compiler._is_whole(link)


def test_a_known_recipe_of_another_generator_is_none(cache, monkeypatch):
    gradient_of(fuse(squares, strict=True))
    monkeypatch.setattr(recipes, "generator", lambda: b"another")
    gradient_of(fuse(squares, strict=True))
    assert len(list(cache.glob("*.recipe"))) == 2 and len(list(cache.glob("*.so"))) == 1
