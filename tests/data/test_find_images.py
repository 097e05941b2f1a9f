from pathlib import Path

from opsin.data.files import find_images


def test_folder_is_recursive_sorted_and_keeps_broken_links(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "a.jpg", "b/10.webp", "b/notes.txt", "c.jpg.bak", "Z.jpeg", "b/c/x.tiff"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "broken.jpg").symlink_to(tmp_path / "gone")
    found = [str(Path(path).relative_to(tmp_path)) for path in find_images([str(tmp_path)])]
    assert found == ["Z.jpeg", "a.jpg", "b/10.webp", "b/2.PNG", "b/broken.jpg", "b/c/x.tiff"]


def test_pattern_gives_its_matches_and_a_file_with_such_a_name_itself(tmp_path: Path) -> None:
    for name in ("1.png", "2.png", "3.jpg", "odd[1].png"):
        (tmp_path / name).touch()
    pattern = f"{tmp_path}/*.png"
    assert [Path(path).name for path in find_images([pattern])] == ["1.png", "2.png", "odd[1].png"]
    assert list(find_images([f"{tmp_path}/odd[1].png"])) == [f"{tmp_path}/odd[1].png"]
    assert list(find_images([f"{tmp_path}/*.gif"])) == [f"{tmp_path}/*.gif"]


def test_what_is_named_is_an_input_whatever_it_is(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    arguments = [
        f"{tmp_path}/notes.txt",
        "x" * 300 + ".jpg",
        "a\0b.png",
        "gone.jpg",
        "https://example.org/a.png?size=*",
        f"{tmp_path}/notes.txt",
    ]
    assert list(find_images(arguments)) == arguments
