"""Signing with keys on a PKCS#11 token: SoftHSM is the real part, a published repository the proof."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tbox.cli.ota import ota
from tbox.errors import TboxError
from tbox.ota import hsm, publish
from tbox.ota.keys import make_key, open_signer, read_public, write_public
from tbox.ota.publish import KeyChange, Publisher
from tests.tuf_repository import START

MODULE = next(
    (
        str(path)
        for top in (Path("/usr/lib"), Path("/usr/local/lib"))
        for path in sorted(top.glob("**/libsofthsm2.so"))
    ),
    "",
)
PIN = "864213"
# Run in a process of its own: SoftHSM reads its configuration once, when it is loaded.
MAKE_KEYS = """
import sys, pkcs11
from pkcs11 import Attribute, KeyType, Mechanism
ED25519 = bytes([0x13, 12]) + b"edwards25519"
token = pkcs11.lib(sys.argv[1]).get_token(token_label="release")
with token.open(rw=True, user_pin=sys.argv[2]) as session:
    curve = session.create_domain_parameters(KeyType.EC_EDWARDS, {Attribute.EC_PARAMS: ED25519}, local=True)
    curve.generate_keypair(store=True, label="ed", mechanism=Mechanism.EC_EDWARDS_KEY_PAIR_GEN)
    session.generate_keypair(KeyType.RSA, 2048, store=True, label="rsa")
    session.generate_keypair(KeyType.RSA, 1024, store=True, label="short")
    point = session.create_domain_parameters(
        KeyType.EC, {Attribute.EC_PARAMS: bytes.fromhex("06082a8648ce3d030107")}, local=True
    )
    point.generate_keypair(store=True, label="p256")
"""
needs_softhsm = pytest.mark.skipif(
    not MODULE or shutil.which("softhsm2-util") is None, reason="needs SoftHSM (apt install softhsm2)"
)


@pytest.fixture(scope="module")
def softhsm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token named "release" with keys; its configuration stays in the environment: it is read once."""
    directory = tmp_path_factory.mktemp("softhsm")
    (directory / "conf").write_text(f"directories.tokendir = {directory}\nobjectstore.backend = file\n")
    os.environ["SOFTHSM2_CONF"] = str(directory / "conf")
    init = ["softhsm2-util", "--init-token", "--free", "--label", "release"]
    subprocess.run([*init, "--pin", PIN, "--so-pin", "97531"], check=True, capture_output=True)
    subprocess.run([sys.executable, "-c", MAKE_KEYS, MODULE, PIN], check=True, capture_output=True)
    (directory / "pin").write_text(PIN + "\n")
    return directory


def uri(softhsm: Path, label: str, token: str = "release", pin: str = "pin") -> str:
    return f"pkcs11:token={token};object={label}?module-path={MODULE}&pin-source=file:{softhsm / pin}"


@needs_softhsm
@pytest.mark.parametrize(("label", "scheme"), [("ed", "ed25519"), ("rsa", "rsassa-pss-sha256")])
def test_a_root_signed_on_tokens_is_taken_by_the_device(
    label: str, scheme: str, softhsm: Path, tmp_path: Path
) -> None:
    signer = open_signer(uri(softhsm, label))
    assert signer.public_key.scheme == scheme
    write_public(tmp_path / "token.pub", signer.public_key)
    key = read_public(tmp_path / "token.pub")
    other = make_key(tmp_path / "file.pem")
    publisher = Publisher(tmp_path / "repo", START)
    publisher.create()
    roles = ("root", "targets", "snapshot", "timestamp")
    staged = publisher.rotate([KeyChange(role, [key, other], threshold=2) for role in roles], weaker=True)
    both = [signer, open_signer(str(tmp_path / "file.pem"))]
    staged += publisher.rotate([KeyChange("rollout", [other])])
    for path in staged:
        publish.sign(path, both)
    assert publisher.publish(both)["root"] == 1  # rehearsed with the device's own workflow


@needs_softhsm
def test_a_signature_stands_for_these_bytes_alone(softhsm: Path) -> None:
    signer = open_signer(uri(softhsm, "ed"))
    signature = signer.sign(b"these bytes")
    signer.public_key.verify_signature(signature, b"these bytes")
    with pytest.raises(Exception, match="verif"):
        signer.public_key.verify_signature(signature, b"other bytes")


@needs_softhsm
def test_the_pin_comes_from_the_environment_too(softhsm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signer = open_signer(uri(softhsm, "ed").partition("&")[0])
    with pytest.raises(TboxError, match="no PIN"):
        signer.sign(b"data")
    monkeypatch.setenv(hsm.PIN_VARIABLE, PIN)
    assert signer.sign(b"data").keyid == signer.public_key.keyid


@needs_softhsm
@pytest.mark.parametrize(
    ("label", "token", "module", "why"),
    [
        ("none", "release", MODULE, "No key matching"),
        ("ed", "elsewhere", MODULE, "No token matching"),
        ("ed", "release", "/nowhere.so", "refused"),
        ("p256", "release", MODULE, "neither an Ed25519 nor an RSA key"),
        ("short", "release", MODULE, "no device would take"),
    ],
)
def test_a_key_that_cannot_sign_is_named(
    label: str, token: str, module: str, why: str, softhsm: Path
) -> None:
    with pytest.raises(TboxError, match=why):
        open_signer(uri(softhsm, label, token).replace(MODULE, module))


@needs_softhsm
def test_the_commands_take_a_token_wherever_they_take_a_key(softhsm: Path, tmp_path: Path) -> None:
    def types(*words: str) -> str:
        done = CliRunner().invoke(ota, list(words), standalone_mode=False)
        if done.exception is not None:
            raise done.exception
        return done.output

    keys, repository = tmp_path / "keys", str(tmp_path / "repo")
    types("keys", "anna", "--dir", str(keys), "--token", uri(softhsm, "ed"))
    types("keys", "ben", "online", "--dir", str(keys))
    assert not (keys / "anna.pem").exists()
    adds = [f"--{role}={keys / name}.pub" for role in ("root", "targets") for name in ("anna", "ben")]
    types(
        "rotate",
        repository,
        *adds,
        "--online",
        str(keys / "online.pub"),
        "--threshold",
        "2",
        "--weaker-than-3-of-5",
    )
    for role in ("root", "targets"):
        staged = f"{repository}/staged/{role}.json"
        assert f"{role}: 1 of the 2" in types("sign", staged, "--key", uri(softhsm, "ed"))
        assert f"{role}: 2 of the 2" in types("sign", staged, "--key", str(keys / "ben.pem"))
    assert "published root version 1" in types("publish", repository, "--key", str(keys / "online.pem"))


@needs_softhsm
def test_a_wrong_pin_is_refused_and_told_to_nobody(softhsm: Path) -> None:
    (softhsm / "wrong").write_text("111222333")
    signer = open_signer(uri(softhsm, "ed", pin="wrong"))
    with pytest.raises(TboxError, match="PinIncorrect") as caught:
        signer.sign(b"data")
    assert "111222333" not in str(caught.value)


@needs_softhsm
def test_what_a_token_answers_is_verified(softhsm: Path, tmp_path: Path) -> None:
    signer = open_signer(uri(softhsm, "ed"))
    signer.public_key = make_key(tmp_path / "other.pem")  # type: ignore[misc]
    with pytest.raises(TboxError, match="does not verify"):
        signer.sign(b"data")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("pkcs11:token=a;object=b?module-path=/m&pin-value=12345", "does not belong on a command line"),
        ("pkcs11:token=a?module-path=/m", "missing: object"),
        ("pkcs11:token=a;object=b", "missing: module-path"),
        ("pkcs11:token=a;object=b;color=red?module-path=/m", "not understood: color"),
        ("pkcs11:token=a;token=c;object=b?module-path=/m", "an attribute twice"),
    ],
)
def test_an_unclear_uri_is_refused(text: str, why: str) -> None:
    with pytest.raises(TboxError, match=why) as caught:
        hsm.parse_uri(text)
    assert "12345" not in str(caught.value)


@given(noise=st.text(max_size=60) | st.from_regex(r"pkcs11:([a-z-]{1,12}=[^;&?]{0,5}[;&?]){0,6}"))
def test_noise_names_a_key_or_is_refused(noise: str) -> None:
    try:
        key = hsm.parse_uri(noise)
    except TboxError:
        return
    assert key.module
    assert key.token
    assert key.label


def test_labels_may_hold_any_character() -> None:
    key = hsm.parse_uri("pkcs11:token=a%20b%3Bc;object=%C3%A4?module-path=/m%26n&pin-source=/p")
    assert key[1:] == ("/m&n", "a b;c", "ä", "/p")


def test_the_device_runs_without_what_the_publisher_installs() -> None:
    code = "import sys; sys.modules |= {'pkcs11': None, 'bsdiff4': None};"
    code += "import tbox.agent, tbox.update, tbox.cli.main; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "tbox.ota.trust" in loaded.split()
    assert not {"tbox.ota.hsm", "tbox.ota.keys", "tbox.ota.publish"} & {*loaded.split()}
