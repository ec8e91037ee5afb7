"""Downloads from a server of ours: ranges, cut connections, changed files, wrong sums. A Hub: test_fetch_hub.py."""

import dataclasses
import hashlib
import os
from pathlib import Path

import pytest

from nft_ray.downloads import transfer as module
from nft_ray.downloads.fetch import fetch
from nft_ray.downloads.published import PublishedFile
from nft_ray.downloads.transfer import PIECE_BYTES
from tests.conftest import free_port
from tests.downloads.misbehaving_site import CONTENT, SHA256, Site, git_sha1, no_leftovers

pytestmark = pytest.mark.usefixtures("quick")


def direct(site: Site, sha256: str | None = SHA256, etag: str | None = '"one"') -> PublishedFile:
    site.files["/weights.pt"] = CONTENT
    site.headers["/weights.pt"] = {"ETag": etag} if etag else {}
    return PublishedFile(path="direct/weights.pt", url=f"{site.url}/weights.pt", sha256=sha256, mib=1)


# Direct URLs


def test_a_file_is_downloaded_once_and_its_sum_lies_beside_it(site: Site, tmp_path: Path) -> None:
    said: list[str] = []
    file = direct(site)
    fetch([file], tmp_path, said.append)
    assert (tmp_path / file.path).read_bytes() == CONTENT
    assert (tmp_path / "direct/weights.pt.sha256").read_text().startswith(f"{SHA256}  weights.pt\n")
    assert no_leftovers(tmp_path)
    assert said == ["[1/1] direct/weights.pt: 1.0 MiB, checksum right"]
    fetch([file], tmp_path, said.append)
    assert len(site.asked) == 1
    assert said[1:] == ["1 of 1 files are there"]


def test_a_file_may_be_pinned_by_the_sum_that_git_gives_it(site: Site, tmp_path: Path) -> None:
    said: list[str] = []
    right, wrong = (
        dataclasses.replace(direct(site, sha256=None), git_sha1=git_sha1(content)) for content in (CONTENT, b"other")
    )
    fetch([right], tmp_path, said.append)
    assert said == ["[1/1] direct/weights.pt: 1.0 MiB, checksum right"]
    (tmp_path / "direct/weights.pt.sha256").unlink()  # somebody brought the file by hand
    fetch([right], tmp_path, said.append)
    assert said[1:] == ["1 of 1 files are there"]
    (tmp_path / "direct/weights.pt.sha256").unlink()
    with pytest.raises(ValueError, match=r"its checksum is [0-9a-f]{40}, published is [0-9a-f]{40}; deleted"):
        fetch([wrong], tmp_path, said.append)


def test_a_cut_connection_is_resumed_where_it_was_cut(site: Site, tmp_path: Path) -> None:
    site.cut_after = [4 * PIECE_BYTES, 3 * PIECE_BYTES]
    fetch([direct(site, sha256=None)], tmp_path, lambda _: None)
    assert (tmp_path / "direct/weights.pt").read_bytes() == CONTENT
    assert [(asked[2], asked[3]) for asked in site.asked] == [
        (None, None),
        (f"bytes={4 * PIECE_BYTES}-", '"one"'),
        (f"bytes={7 * PIECE_BYTES}-", '"one"'),
    ]
    assert site.sent == len(CONTENT)


def test_a_later_fetch_goes_on_with_what_came_before(site: Site, tmp_path: Path) -> None:
    said: list[str] = []
    file = direct(site)
    site.cut_after = [6 * PIECE_BYTES] + [0] * (module.ATTEMPTS - 1)
    with pytest.raises(ValueError, match=r"^127.0.0.1:\d+ cannot be reached"):
        fetch([file], tmp_path, said.append)
    assert (tmp_path / "direct/weights.pt.part").stat().st_size == 6 * PIECE_BYTES
    assert not (tmp_path / file.path).exists()
    site.asked.clear()
    fetch([file], tmp_path, said.append)
    assert [asked[2] for asked in site.asked] == [f"bytes={6 * PIECE_BYTES}-"]
    assert site.sent == len(CONTENT)
    assert (tmp_path / file.path).read_bytes() == CONTENT


def test_a_file_that_changed_in_between_starts_again(site: Site, tmp_path: Path) -> None:
    file = direct(site, sha256=None)
    site.cut_after = [6 * PIECE_BYTES] + [0] * (module.ATTEMPTS - 1)
    with pytest.raises(ValueError):
        fetch([file], tmp_path, lambda _: None)
    site.files["/weights.pt"], site.headers["/weights.pt"] = CONTENT[::-1], {"ETag": '"two"'}
    fetch([file], tmp_path, lambda _: None)
    assert site.asked[-1][2:4] == (f"bytes={6 * PIECE_BYTES}-", '"one"')
    assert (tmp_path / file.path).read_bytes() == CONTENT[::-1]


def test_without_a_name_of_the_version_nothing_is_resumed(site: Site, tmp_path: Path) -> None:
    site.cut_after = [6 * PIECE_BYTES]
    fetch([direct(site, sha256=None, etag='W/"weak"')], tmp_path, lambda _: None)
    assert [asked[2] for asked in site.asked] == [None, None]
    assert (tmp_path / "direct/weights.pt").read_bytes() == CONTENT


@pytest.mark.parametrize("excess", [0, 7])
def test_a_part_that_is_whole_or_too_long(site: Site, tmp_path: Path, excess: int) -> None:
    file = direct(site)
    part = tmp_path / "direct/weights.pt.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT + b"?" * excess)
    (tmp_path / "direct/weights.pt.part.tag").write_text(SHA256)
    fetch([file], tmp_path, lambda _: None)
    assert (tmp_path / file.path).read_bytes() == CONTENT
    assert site.sent == (len(CONTENT) if excess else 0)
    assert no_leftovers(tmp_path)


def test_a_wrong_checksum_deletes_the_file_and_says_both(site: Site, tmp_path: Path) -> None:
    file = direct(site)
    site.files["/weights.pt"] = CONTENT[::-1]
    other = hashlib.sha256(CONTENT[::-1]).hexdigest()
    with pytest.raises(ValueError, match=f"its checksum is {other}, published is {SHA256}"):
        fetch([file], tmp_path, lambda _: None)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_busy_server_is_asked_again(site: Site, tmp_path: Path) -> None:
    site.statuses = [503, 429]
    fetch([direct(site)], tmp_path, lambda _: None)
    assert len(site.asked) == 3
    assert (tmp_path / "direct/weights.pt").read_bytes() == CONTENT


def test_what_is_missing_is_fetched_although_another_fails(site: Site, tmp_path: Path) -> None:
    file, said = direct(site), []
    gone = [PublishedFile(path=f"direct/{name}", url=f"{site.url}/{name}") for name in ("gone.pt", "lost.pt")]
    with pytest.raises(ValueError, match=r"^[^\n]*/gone.pt: the server answers 404; .*\(and 1 more, said above\)$"):
        fetch([gone[0], file, gone[1]], tmp_path, said.append)
    assert (tmp_path / file.path).read_bytes() == CONTENT
    assert "lost.pt: the server answers 404" in said[-1]
    assert no_leftovers(tmp_path)


def test_without_a_network_it_says_which_file_goes_where(tmp_path: Path) -> None:
    port = free_port()
    files = [PublishedFile(path=f"direct/{i}.pt", url=f"http://127.0.0.1:{port}/{i}.pt", sha256=SHA256) for i in (1, 2)]
    said: list[str] = []
    with pytest.raises(ValueError) as caught:
        fetch(files, tmp_path, said.append)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"127.0.0.1:{port} cannot be reached (")
    assert "refused" in message
    assert f"download http://127.0.0.1:{port}/1.pt and put it at {tmp_path}/direct/1.pt" in message
    assert f"download http://127.0.0.1:{port}/2.pt and put it at {tmp_path}/direct/2.pt" in said[-1]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# Files that are there already


def test_a_copied_file_is_checked_once_and_needs_no_network(tmp_path: Path) -> None:
    file = PublishedFile(path="direct/weights.pt", url="http://127.0.0.1:9/weights.pt", sha256=SHA256)
    (tmp_path / "direct").mkdir()
    (tmp_path / file.path).write_bytes(CONTENT)
    fetch([file], tmp_path, lambda _: None)
    assert SHA256 in (tmp_path / "direct/weights.pt.sha256").read_text()


def test_a_damaged_file_is_downloaded_again(site: Site, tmp_path: Path) -> None:
    file = direct(site)
    fetch([file], tmp_path, lambda _: None)
    target, said = tmp_path / file.path, []
    target.write_bytes(CONTENT[:-1])
    fetch([file], tmp_path, said.append)
    assert target.read_bytes() == CONTENT
    target.write_bytes(b"?" + CONTENT[1:])  # the same size, but written after it was checked
    later = target.with_name("weights.pt.sha256").stat().st_mtime_ns + 10**9
    os.utime(target, ns=(later, later))
    fetch([file], tmp_path, said.append)
    assert target.read_bytes() == CONTENT
    assert sum("is not what is published" in line for line in said) == 2


def test_too_little_disk_is_said_before_anything_is_asked(site: Site, tmp_path: Path) -> None:
    file = direct(site)
    huge = PublishedFile(path=file.path, url=file.url, sha256=SHA256, mib=1e12)
    with pytest.raises(ValueError, match=r"GiB are to come and [\d.]+ GiB are free; make room, or choose"):
        fetch([huge], tmp_path / "new", lambda _: None)
    assert site.asked == []


def test_two_fetches_do_not_write_one_file(site: Site, tmp_path: Path) -> None:
    file = direct(site)
    with module.locked(tmp_path / "direct/weights.pt.part"), pytest.raises(ValueError, match="another fetch"):
        fetch([file], tmp_path, lambda _: None)


def test_progress_is_a_line_now_and_then(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.0)
    monkeypatch.setattr(module, "PIECE_BYTES", 2**18)
    said: list[str] = []
    fetch([direct(site)], tmp_path, said.append)
    assert [line.split(",")[0] for line in said if "MiB/s" in line] == [
        f"[1/1] direct/weights.pt: {done} of 1 MiB" for done in (0, 0, 1, 1)
    ]
