"""Which allocations of a compiled loop may leave it, and which may not."""

import pytest

from vi_toolkit.compiled.allocation import allocate_once


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
    """The lines before the loop and those in it, for a loop with that body."""
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


def test_what_was_not_there_before_the_loop_is_not_swapped():
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
def test_what_leaves_the_iteration_keeps_its_own_memory(way_out):
    body = [*made("a"), *way_out, "state.reset();", "state = std::move(out);"]
    before, inside = parts(body)
    assert before == [""] and inside == body


def test_a_source_of_another_form_stays_as_it_is():
    inner = [*made("a"), "if (flag) {", "kernel(a);", "}", "a.reset();"]
    assert parts(inner) == ([""], inner)
    lost = [*made("a"), "keep(a.release());"]
    assert parts(lost) == ([""], lost)
    for source in ("no loop\n", "    while (1) {\n    while (1) {\n", "    while (1) {\n"):
        assert allocate_once(source) == source
