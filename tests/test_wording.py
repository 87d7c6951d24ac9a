"""Numbers, names and limits in words."""

from onnxcomp.wording import grouped


def test_texts_that_differ_in_names_and_fractions_count_as_one() -> None:
    texts = [
        "'/a.1/Add' loses 0.04",
        "'/b.2/Add' loses 3.1e-05",
        "'/c.3/Add' loses 0.5",
        "48 of 64 left",
        "32 of 64 left",
    ]
    nodes = [f"n{number}" for number in range(len(texts))]
    assert grouped(list(zip(nodes, texts, strict=True))) == [
        ("'...' loses 3.1e-05 to 0.5", ["n0", "n1", "n2"]),
        ("48 of 64 left", ["n3"]),
        ("32 of 64 left", ["n4"]),
    ]
    assert grouped([("a", "'x' loses 0.1"), ("b", "'y' loses 0.1")]) == [("'...' loses 0.1", ["a", "b"])]
    assert grouped([("a", "'x' loses 0.1"), ("b", "'x' loses 0.1")]) == [("'x' loses 0.1", ["a", "b"])]
