"""Single parts of the builder: ELF, cpio, the kernel's payload, packages, the seccomp profile."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest
from builder import debs, elf, initrd, kernel, seccomp, tree
from builder.errors import BuildError


def test_needed_libraries_are_those_that_the_loader_sees() -> None:
    seen = subprocess.run(["ldd", "/usr/bin/bash"], capture_output=True, text=True).stdout
    direct = elf.needed_libraries(Path("/usr/bin/bash"))
    assert "libc.so.6" in direct
    assert all(name in seen for name in direct)


def test_what_is_no_elf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"MZ nothing of the kind")
    assert not elf.is_elf(tmp_path / "x")
    with pytest.raises(BuildError, match="64-bit ELF"):
        elf.needed_libraries(tmp_path / "x")


def test_a_program_is_no_kernel_module() -> None:
    with pytest.raises(BuildError, match="modinfo"):
        elf.module_info(Path("/usr/bin/bash"))


def test_initrd_is_a_cpio_archive_with_a_console(tmp_path: Path) -> None:
    init, module = tmp_path / "init", tmp_path / "some.ko"
    init.write_bytes(b"#!init")
    module.write_bytes(b"module")
    initrd.write_initrd(tmp_path / "initrd.img", init, [module])
    with (tmp_path / "initrd.img").open("rb") as archive:
        listing = subprocess.run(["cpio", "-tv", "--quiet"], stdin=archive, capture_output=True, text=True, check=True)
    lines = listing.stdout.splitlines()
    assert any(line.startswith("crw-------") and line.endswith("dev/console") for line in lines)
    assert any(line.startswith("-rwxr-xr-x") and line.endswith(" init") for line in lines)
    assert [line.split()[-1] for line in lines[-2:]] == ["etc/modules", "modules/some.ko"]


def test_signature_is_cut_off_and_nothing_else() -> None:
    trailer = struct.pack(">5B3xI", 0, 0, 2, 0, 0, 7)
    assert initrd.without_signature(b"module" + b"s" * 7 + trailer + b"~Module signature appended~\n") == b"module"
    assert initrd.without_signature(b"unsigned module") == b"unsigned module"


def test_unknown_kernel_module_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="kernel module no_such"):
        initrd.resolve_modules(["no_such"], tmp_path)


def bzimage(payload: bytes, *, magic: bytes = b"HdrS") -> bytes:
    """The parts of a bzImage that the builder looks at: one setup sector and the payload behind it."""
    head = bytearray(1024)
    head[0x1F1] = 1
    head[0x202:0x206] = magic
    struct.pack_into("<II", head, 0x248, 0, len(payload))
    return bytes(head) + payload


def test_kernel_payload_is_found() -> None:
    blocks = struct.pack("<I", 3) + b"abc" + struct.pack("<I", 2) + b"de"
    image = bzimage(b"\x02\x21\x4c\x18" + blocks + b"size")
    assert [image[o : o + n] for o, n in kernel.lz4_ranges(image)] == [b"abc", b"de"]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (bzimage(b"", magic=b"None"), "no bzImage"),
        (b"", "no bzImage"),
        (bzimage(b"\xfd7zXZ\0\0\0"), "not compressed with LZ4"),
        (bzimage(b"\x02\x21\x4c\x18" + struct.pack("<I", 99) + b"abc" + b"size"), "cut short"),
        (bzimage(b"\x02\x21\x4c\x18" + struct.pack("<I", 0) + b"size"), "cut short"),
    ],
)
def test_another_kernel_format_is_named(image: bytes, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        kernel.lz4_ranges(image)


def test_pvh_entry_is_looked_for() -> None:
    assert not kernel.has_pvh_entry(b"")
    assert not kernel.has_pvh_entry(Path("/usr/bin/bash").read_bytes())


def test_unknown_package_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="apt-get update"):
        debs.resolve(["no-such-package-of-podvisor"], tmp_path)


def test_broken_package_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "broken_1_all.deb").write_bytes(b"!<arch>\nnonsense")
    deb = debs.Deb("broken", "1", "broken_1_all.deb", "0" * 64)
    with pytest.raises(BuildError, match="dpkg-deb"):
        debs.unpack(deb, tmp_path)
    assert not (tmp_path / "unpacked" / f"broken-{'0' * 16}").exists()


def test_package_that_cannot_be_fetched_says_what_to_do(tmp_path: Path) -> None:
    deb = debs.Deb("busybox-static", "0.0-none", "busybox-static_0.0-none_amd64.deb", "0" * 64)
    with pytest.raises(BuildError, match="apt-get update"):
        debs.fetch([deb], tmp_path)


def test_missing_library_is_named(tmp_path: Path) -> None:
    tree.copy_file(Path("/usr/bin/bash"), tmp_path / "root/usr/bin/bash")
    with pytest.raises(BuildError, match=r"no package in packages.py has the library lib\w+"):
        tree.install_libraries(tmp_path / "root", [])


def profile(*rules: dict[str, object]) -> dict[str, object]:
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 38,
        "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": []}, {"architecture": "SCMP_ARCH_ARM"}],
        "syscalls": list(rules),
    }


def rule(*names: str, **more: object) -> dict[str, object]:
    return {"names": list(names), "action": "SCMP_ACT_ALLOW", "args": [], "includes": {}, "excludes": {}, **more}


def decide(narrowed: dict[str, object], family: int, protocol: int, *, audit: bool) -> str:
    """What a profile says to socket(family, _, protocol): what at most one rule says, or else the default."""
    compare = {"NE": int.__ne__, "EQ": int.__eq__, "LT": int.__lt__, "GT": int.__gt__}
    verdicts = set()
    for row in narrowed["syscalls"]:  # type: ignore[attr-defined]
        wanted, unwanted = (row[key].get("caps", []) for key in ("includes", "excludes"))
        if "socket" not in row["names"] or (wanted and not audit) or (unwanted and audit):
            continue
        values = {0: family, 2: protocol}
        if all(compare[a["op"].removeprefix("SCMP_CMP_")](values[a["index"]], a["value"]) for a in row["args"]):
            verdicts.add(row["action"])
    assert len(verdicts) <= 1, (family, protocol, audit, verdicts)
    return str(verdicts.pop() if verdicts else narrowed["defaultAction"])


@pytest.mark.parametrize("audit", [False, True])
def test_vsock_is_refused_and_the_usual_families_are_not(audit: bool) -> None:
    narrowed = seccomp.narrow(profile(rule("socket", "read", "io_uring_setup"), rule("socketcall")))
    assert decide(narrowed, 40, 0, audit=audit) == "SCMP_ACT_ERRNO"
    for family in (1, 2, 10, 16, 17):
        assert decide(narrowed, family, 0, audit=audit) == "SCMP_ACT_ALLOW"
    assert (decide(narrowed, 16, 9, audit=audit) == "SCMP_ACT_ALLOW") is audit
    for family in range(64):  # never two verdicts
        decide(narrowed, family, 0, audit=audit)
    assert [row["names"] for row in narrowed["syscalls"] if "socket" not in row["names"]] == [["read"]]


def test_foreign_architectures_go_but_capabilities_stay() -> None:
    foreign = rule("s390_runtime_instr", includes={"arches": ["s390x"]})
    chroot = rule("chroot", includes={"caps": ["CAP_SYS_CHROOT"]})
    kept = seccomp.narrow(profile(foreign, chroot))["syscalls"]
    assert kept[0] == chroot
    assert len(kept) == 1 + len([r for r in kept if r["names"] == ["socket"]])


def test_profile_of_another_shape_is_refused() -> None:
    with pytest.raises(BuildError, match="shape"):
        seccomp.narrow({"syscalls": []})
    with pytest.raises(BuildError, match="no longer refuses by default"):
        seccomp.narrow({**profile(), "defaultAction": "SCMP_ACT_ALLOW"})


@pytest.mark.parametrize("loose", [rule("socket"), rule("socketcall"), rule("io_uring_setup")])
def test_a_way_to_vsock_is_found(loose: dict[str, object]) -> None:
    with pytest.raises(BuildError):
        seccomp.check(profile(loose))
