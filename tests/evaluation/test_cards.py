"""The section of a release's card: what it says, where it goes, and that it says no more than was measured."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from unmergeable import claims, ops
from unmergeable.checkpoint.card import front_matter
from unmergeable.cli import main
from unmergeable.errors import BadInput, UsageError
from unmergeable.evaluation import model_card, read_audit, release_card
from unmergeable.evaluation.cells import digest_of
from unmergeable.evaluation.report.verdict import as_markdown
from zoo import TOYS, write_toy

CARD = "---\nlicense: mit\ntags: [mine]\n---\n# Mine\n\nWhat it does.\n"
BASE_CARD = "---\nlicense: other\nlicense_name: gentle-1\nlicense_link: https://example.org/gentle\n---\n# Base\n"
AUDIT = Path(__file__).parents[2] / "benchmarks" / "results" / "vision_audit.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(("base", "expert")):
        write_toy(TOYS["llama"], folder / name, seed=seed)
    (folder / "expert" / "README.md").write_text(CARD)
    (folder / "base" / "README.md").write_text(BASE_CARD)
    # As the committed audit has it.
    settings = {"quantisation": "free"}
    ops.protect(folder / "expert", base=folder / "base", out=folder / "release", method="gauge", settings=settings)
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "work")
    return tmp_path / "work"


def test_it_says_what_was_done_and_what_that_is_worth(work: Path) -> None:
    text = release_card(work / "release", base="owner/base").text
    assert "changed by `gauge` with `quantisation=free` (" in text
    assert as_markdown(claims.limits("gauge")) in text, "the sentence is that of the committed audits"
    assert "not audited" in text
    assert "[owner/base](https://huggingface.co/owner/base)" in text
    assert "unmergeable restore hub:OWNER/NAME --key KEY" in text
    assert "LlamaForCausalLM.from_pretrained" in text


def test_settings_that_are_not_defaults_are_named(work: Path) -> None:
    ops.protect(work / "expert", base=work / "base", out=work / "other", method="gauge", settings={"residual": False})
    assert "`gauge` with `residual=false`" in release_card(work / "other").text
    assert "residual" not in release_card(work / "release").text.partition("\n\n### ")[0]


def test_nothing_in_it_is_secret_or_of_this_machine(work: Path) -> None:
    made = release_card(work / "release", base=work / "base")
    key = json.loads((work / "release.key").read_text())
    assert key["secret"][:12] not in made.text
    assert str(work) not in made.text
    assert key["fingerprint"][:8] in made.text, "control: what the manifest publishes may be there"


def test_every_command_in_it_works(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = release_card(work / "release").text
    for line in re.findall(r"^unmergeable .*$", text, re.MULTILINE):
        words = line.replace("hub:OWNER/NAME", str(work / "release")).replace("KEY", str(work / "release.key")).split()
        words = [str(work / word) if word == "restored" else word for word in words]
        assert main(words[1:]) == 0, capsys.readouterr().err
    assert (work / "restored").is_dir()


def test_the_rest_of_the_card_stays(work: Path) -> None:
    path = work / "release" / "README.md"
    made = release_card(work / "release", base="owner/base", write=True)
    written = path.read_text()
    assert made.written == path
    assert made.text in written
    assert written.endswith("<!-- end of unmergeable: protection -->\n")
    assert written.replace("base_model: owner/base\nbase_model_relation: finetune\n", "").startswith(CARD)
    # Again, and with nothing given: the base is read from the card.
    release_card(work / "release", write=True)
    assert path.read_text() == written
    assert ops.verify_manifest(work / "release").is_intact


def test_an_old_section_is_replaced(work: Path) -> None:
    path = work / "release" / "README.md"
    release_card(work / "release", write=True)
    path.write_text(path.read_text().replace("### Use", "### Old") + "\nLast words.\n")
    release_card(work / "release", repo="me/mine", write=True)
    assert "### Old" not in path.read_text()
    assert 'from_pretrained("me/mine")' in path.read_text()
    assert path.read_text().endswith("\nLast words.\n")


def test_a_release_without_a_card_gets_one(work: Path) -> None:
    path = work / "release" / "README.md"
    path.unlink()
    release_card(work / "release", base="owner/base", write=True)
    assert front_matter(path.read_text(), "x") == {"base_model": "owner/base", "base_model_relation": "finetune"}


def test_the_licence_of_the_base_is_read_from_its_card(work: Path) -> None:
    made = release_card(work / "release", base=work / "base")
    assert "`gentle-1` (https://example.org/gentle)" in made.text
    assert "gentle-1; look whether that is allowed" in " ".join(made.notes)
    unknown = release_card(work / "release", base="owner/base")
    assert "Read the licence of the base" in unknown.text


def test_the_base_on_the_hub_is_asked_for_its_card_alone(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def hf_hub_download(name: str, file: str, *, revision: str | None) -> str:
        asked.append((name, file, revision))
        return str(work / "base" / "README.md")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    made = release_card(work / "release", base="hub:owner/base@v1")
    assert asked == [("owner/base", "README.md", "v1")]
    assert made.entries["base_model"] == "owner/base"
    assert "gentle-1" in made.text


def test_a_snapshot_in_the_cache_says_its_name(work: Path) -> None:
    snapshot = work / "models--owner--the-base" / "snapshots" / "abc"
    shutil.copytree(work / "base", snapshot)
    assert release_card(work / "release", base=snapshot).entries["base_model"] == "owner/the-base"


def test_an_adapter_is_called_one(work: Path) -> None:
    import peft

    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path="owner/the-base")
    settings.save_pretrained(work / "adapter")
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    width = json.loads((work / "base" / "config.json").read_text())["hidden_size"]
    out = load_file(work / "base" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].shape[0]
    factors = {f"{layer}.lora_A.weight": torch.ones(2, width), f"{layer}.lora_B.weight": torch.ones(out, 2)}
    save_file(factors, work / "adapter" / "adapter_model.safetensors")
    ops.protect(work / "adapter", base=work / "base", out=work / "released", keep_adapter=True)
    made = release_card(work / "released")
    assert made.entries == {"base_model": "owner/the-base", "base_model_relation": "adapter"}
    assert "PeftModel.from_pretrained" in made.text
    assert "This stops nothing" in made.text
    assert "This changes what the model computes" not in made.text


def test_another_base_than_the_card_names_is_told_and_left(work: Path) -> None:
    path = work / "release" / "README.md"
    path.write_text(CARD.replace("license", "base_model: first/base\nlicense", 1))
    made = release_card(work / "release", base="other/base", write=True)
    assert "'first/base' and not other/base" in " ".join(made.notes)
    assert front_matter(path.read_text(), "x")["base_model"] == "first/base"


@pytest.mark.parametrize("name", ["expert", "base"])
def test_what_is_no_release_is_refused(name: str, work: Path) -> None:
    with pytest.raises(BadInput, match="is no release"):
        release_card(work / name)


def test_names_that_are_none_are_refused(work: Path) -> None:
    with pytest.raises(UsageError, match="OWNER/NAME"):
        release_card(work / "release", repo="mine")
    with pytest.raises(BadInput, match="OWNER/NAME"):
        release_card(work / "release", base="nowhere")


def audit_of(folder: Path, entry: dict[str, Any] | str, digests: dict[str, str]) -> Path:
    """A committed audit, of one release: its figures are those of ``gauge``."""
    document = json.loads(AUDIT.read_text())
    name = entry if isinstance(entry, str) else entry["name"]
    document["plan"]["protect"]["methods"] = [entry]
    document["protections"] = {name: document["protections"]["gauge"]}
    document["digests"] |= digests
    path = folder / "audit.json"
    path.write_text(json.dumps(document))
    return path


def test_an_audit_of_this_release_is_known_by_its_files(work: Path) -> None:
    release, entry = work / "release", {"name": "theirs", "checkpoint": "somewhere/release"}
    audit = audit_of(work, entry, {"release": digest_of(release)})
    release_card(release, audit=audit, write=True)
    text = release_card(release, audit=audit).text
    assert "Audited: this release." in text
    assert model_card(read_audit(audit)).strip() in text
    assert "D\\* = 1.00" in text
    assert "not audited" not in text
    weights = release / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(BadInput, match="not of this release"):
        release_card(release, audit=audit_of(work, entry, {"release": digest_of(work / "expert")}))


def test_an_audit_of_the_methods_must_have_the_same_settings(work: Path) -> None:
    text = release_card(work / "release", audit=AUDIT).text
    assert "under keys of the audit's own" in text
    assert "mergelock" not in text.partition("### What it is worth")[2].partition("### What it does not")[0]
    ops.protect(work / "expert", base=work / "base", out=work / "default")
    with pytest.raises(BadInput, match="nor of gauge with its settings"):
        release_card(work / "default", audit=AUDIT)


def test_several_of_one_kind_want_a_name(work: Path) -> None:
    document = json.loads(AUDIT.read_text())
    document["plan"]["protect"]["methods"] += [
        {"name": "again", "method": "gauge", "settings": {"quantisation": "free"}}
    ]
    document["protections"]["again"] = document["protections"]["gauge"]
    path = work / "audit.json"
    path.write_text(json.dumps(document))
    with pytest.raises(BadInput, match=r"gauge, again for this release; say which with --protection"):
        release_card(work / "release", audit=path)
    assert "again" in release_card(work / "release", audit=path, protection="again").text


def test_a_failed_audit_gives_no_verdict(work: Path) -> None:
    document = json.loads(AUDIT.read_text())
    document["passed"] = False
    path = work / "audit.json"
    path.write_text(json.dumps(document))
    text = release_card(work / "release", audit=path).text
    assert "**Invalid audit:**" in text
    assert "It stops" not in text
    assert "It stops" in release_card(work / "release", audit=AUDIT).text, "control"


def test_the_command_prints_it_and_writes_it(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    release = str(work / "release")
    assert main(["card", release, "--base", "owner/base"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("## Protection against merging")
    assert "unmergeable: protection" not in (work / "release" / "README.md").read_text()
    assert main(["card", release, "--base", "owner/base", "--write", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["card"] in (work / "release" / "README.md").read_text()
    assert document["front_matter"]["base_model_relation"] == "finetune"
