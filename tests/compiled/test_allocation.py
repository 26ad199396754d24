"""Which allocations of a compiled loop may leave it, and which may not."""

import pytest
import torch

from vi_toolkit.compiled import aot_cache
from vi_toolkit.compiled.allocation import allocate_once
from vi_toolkit.compiled.rewrites import lookups_stay_inside


def made(name, how="aoti_torch_empty_strided(1, size, stride, "):
    return [
        f"AtenTensorHandle {name}_handle;",
        f"CHECK({how}&{name}_handle));",
        f"RAIIAtenTensorHandle {name}({name}_handle);",
    ]


def taken(name, source):
    return made(name, f"aoti_torch_assign_tensors_out({source}, ")


def view(name, source, end="  // alias"):
    start = f"auto {name} = wrap_with_raii_handle_if_needed(reinterpret_tensor_wrapper("
    return f"{start}{source}, 1, size, stride, 0L));{end}"


START = "    RAIIAtenTensorHandle state(state_handle);\n"


def parts(*body):
    """The lines before the loop and those in it, of a program with that body."""
    lines = [line for part in body for line in ([part] if isinstance(part, str) else part)]
    source = START + "    while (1) {\n" + "\n".join(8 * " " + x for x in lines) + "\n    }\nend\n"
    before, rest = allocate_once(source).split("    while (1) {\n")
    inside, after = rest.split("\n    }\n")
    assert before.startswith(START) and after == "end\n"
    before = before.removeprefix(START).rstrip()
    return tuple([x.strip() for x in text.split("\n")] for text in (before, inside))


def test_what_ends_with_the_iteration_is_allocated_before_the_loop():
    before, inside = parts(
        taken("input", "state"),
        made("a"),
        view("b", "a"),
        "kernel(input, a, b);",
        "auto c = std::move(a);  // reuse",
        view("d", "c", end=" c.reset();  // reuse"),
        "kernel(c, d);",
        made("new_state"),
        "input.reset();",
        "d.reset();",
        "state.reset();",
        "state = std::move(new_state);",
    )
    once = [*made("a"), view("b", "a", end=""), "auto& c = a;", view("d", "c", end="")]
    assert before == once + made("new_state")
    assert inside == [
        "auto& input = state;",
        "kernel(input, a, b);",
        "kernel(c, d);",
        "std::swap(state, new_state);",
    ]


def test_what_was_not_there_before_the_loop_changes_places_with_nothing():
    body = [*made("a"), "other.reset();", "other = std::move(a);", "if (!other) break;"]
    assert parts(body) == ([""], body)


@pytest.mark.parametrize(
    "way_out",
    [
        ["auto out = std::move(a);  // reuse"],
        [view("out", "a")],
        [view("out", "a", end=" a.reset();  // reuse")],
        made("out", "aoti_torch_cpu_detach(a, "),  # an operator may return its argument's memory
        [view("b", "a"), "auto out = std::move(b);  // reuse"],
    ],
)
def test_the_memory_of_what_leaves_the_iteration_is_its_own(way_out):
    body = [*made("a"), *way_out, "state.reset();", "state = std::move(out);"]
    before, inside = parts(body)
    assert before == [""] and inside == body


def test_a_program_of_another_form_stays_as_it_is():
    inner = [*made("a"), "if (flag) {", "kernel(a);", "}", "a.reset();"]
    assert parts(inner) == ([""], inner)
    lost = [*made("a"), "keep(a.release());"]
    assert parts(lost) == ([""], lost)
    for source in ("no loop\n", "    while (1) {\n    while (1) {\n", "    while (1) {\n"):
        assert allocate_once(source) == source


def body_of(function, *inputs):
    return aot_cache.functional(function, inputs).graph


def test_indices_need_no_check_if_they_cannot_be_out_of_range():
    i, rows = torch.tensor(0), torch.arange(6).reshape(2, 3)
    table, group = torch.randn(10), torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 0, 1])

    def lookup(i, rows, table):
        chosen = rows.index_select(0, i.reshape(1))[0]
        return i + 1, table[chosen] + 1, table.index_put((chosen,), table[:3])

    graph = body_of(lookup, i, rows, table)
    assert lookups_stay_inside(graph, {0: 2, 1: 10})
    assert not lookups_stay_inside(graph, {0: 3, 1: 10})  # more steps than rows
    assert not lookups_stay_inside(graph, {0: 2, 1: 11})  # a plate larger than the table
    assert not lookups_stay_inside(graph, {0: 2})

    def by_group(i, rows, table, group):
        return table[group[rows[0]]]

    assert not lookups_stay_inside(body_of(by_group, i, rows, table, group), {0: 2, 1: 10})
    by_value = body_of(lambda i, rows, table: table[(table.sigmoid() * 9).long()], i, rows, table)
    assert not lookups_stay_inside(by_value, {0: 2, 1: 10})
    shifted = body_of(lambda i, rows, table: table[rows[0] + 5], i, rows, table)
    assert not lookups_stay_inside(shifted, {0: 2, 1: 10})
    assert lookups_stay_inside(body_of(lambda i, rows, table: table.exp(), i, rows, table), {0: 2})
