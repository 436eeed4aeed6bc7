"""The names that users import, and where they import them from: one that goes away, or moves, is a decision."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

PUBLIC = {
    "flexcache": (
        "CaptureSpec ChatOptions Choice Documents Filling FlexCacheError FlexModel Generation HookFunction "
        "LogitDifference  ModelSource NextTokenLoss Packing Recorder Removal RunOptions Site Store Thinning "
        "Transform Windows attach capture  capture_variants copy exchange export extend fill generate "
        "import_folder merge open open_documents recompute  record repair thin training verify"
    ),
    "flexcache.documents": "CSV_NULLS Documents RESERVED load_dataset open_documents",
    "flexcache.exchange": "export import_folder",
    "flexcache.hooks": (
        "Activation ActivationHooks FlexModel HookFunction HookPoint check_sites edits find_blocks "
        "find_hook_points measure user_hooks"
    ),
    "flexcache.images": "Patches decode_image encode_image",
    "flexcache.parallel": "Distribution Mesh Stages",
    "flexcache.recording": "Batch LogitDifference NextTokenLoss Objective Recorder Transform",
    "flexcache.store": (
        "LabelTable Provenance Removal Repair Store Verification copy merge repair rows_in select verify"
    ),
    "flexcache.training": "Loader ReaderOptions Stream stream",
    "flexcache.virtual": "AttachOptions Attachment Filling ReadPlan Thinning attach fill thin",
    "analysis": (
        "codecs comparison dataset erasure examples geometry lens logit_attribution moments onepass outliers "
        "probe_dataset probes quantiles readout replay report similarity statistics survey targets tokens"
    ),
    "analysis.comparison": "StoreComparison compare_stores load",
    "analysis.probes": (
        "AttentionPooled Best Direction INLP LDA LinearProbe Logistic MLP MassMean NearestCentroid Ridge Sweep "
        "SweepOptions by_position calibration compare confusion heat_map load load_direction save_dataset score sweep "
        "sweeps transfer transfer_map transfer_matrix"
    ),
    "analysis.replay": (
        "Alternatives ByLayer Chain Clamp Edit Engine Erase ExecutionOptions Fitted Function Grid Identity Interchange "
        "Interpolate Mean Metric Noise NormMatched OnHeads Outcome Patch Placed PlacedEdit ProjectOut Receiver "
        "Resample Scale SetNeurons Start Steer Sweep Zero attribution find_incompatibilities grid identity_error load "
        "load_rest obstacles projection same_length sweep verify"
    ),
    "analysis.report": "write",
    "analysis.statistics.onepass": "DocumentSample Grouping PassResult RowBlock State Statistic grouping read",
}


@pytest.mark.parametrize("package", PUBLIC)
def test_a_package_exports_its_public_names_and_no_others(package: str) -> None:
    module = importlib.import_module(package)
    assert sorted(module.__all__) == sorted(PUBLIC[package].split())
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module)
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018 - the access is what is tested


def test_a_function_is_exported_even_when_its_module_was_imported_first() -> None:
    code = "import flexcache.recording.capture, flexcache.store.manage.copy, flexcache; flexcache.capture.__name__"
    code += "; assert callable(flexcache.capture) and callable(flexcache.copy) and callable(flexcache.store.copy)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_reading_and_analysing_import_no_torch() -> None:
    code = "import sys, flexcache, analysis; flexcache.open, flexcache.Site, flexcache.export, flexcache.verify"
    code += "; from analysis import moments, probes, lens, survey; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_api_pages_show_every_name_of_flexcache_under_its_public_name() -> None:
    pages = "".join(page.read_text() for page in (Path(__file__).parents[1] / "docs" / "api").glob("*.md"))
    shown = set(re.findall(r"^\.\. auto\w+:: (\S+)$", pages, re.MULTILINE))
    for name in shown:
        found = importlib.import_module(name.partition(".")[0])
        for part in name.split(".")[1:]:
            found = getattr(found, part, None) or importlib.import_module(f"{found.__name__}.{part}")
    elsewhere = {
        "FlexCacheError",
        "exchange",
        "open",
        "training",
    }  # the page of errors, modules, and Store's other name
    assert {f"flexcache.{name}" for name in PUBLIC["flexcache"].split() if name not in elsewhere} <= shown
