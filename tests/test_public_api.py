"""What ``import concept_unlearn`` promises: these names, each explained, and nothing slow on the way."""

from __future__ import annotations

import importlib.resources
import json
import subprocess
import sys
from types import ModuleType

import pytest
import yaml

import concept_unlearn
from concept_unlearn import Architecture, Attack, Benchmark, Edit, Gate, Method, Metric, Objective, Score, WeightScore
from concept_unlearn.edits import Relative

EXPORTED = [
    "Calibration", "calibrate", "find_strength", "compare", "Passage", "Probe", "Scope", "concepts", "Dictionary",
    "SAEDictionary", "load_dictionary", "Clamp", "DenseClamp", "Edit", "Mean", "Refuse", "Relative", "Scale",
    "Shift", "Zero", "ConceptUnlearnError", "ConceptBenchmark", "AttributionScore", "AUCScore", "CountScore",
    "EnrichmentScore", "FisherScore", "MeanDifferenceScore", "Score", "SelectivityScore", "SparsityScore", "Stats",
    "attribute", "difference_of_means", "leace", "matched_frequency", "measure", "measure_all", "select",
    "fit_gate", "Always", "Gate", "ProbeGate", "SequenceGate", "StreamingGate", "TokenGate", "LM", "Site",
    "GEffect", "PGEffect", "g_effect", "pg_effect", "trace_g_effect",
    "PRESETS", "Finetune", "PrimalDual", "Watch", "Batch", "Read", "Step",
    "Method", "Steer", "Study", "Suppress", "preset", "FeaturePatch", "Patch", "Stack", "WeightPatch",
    "load_patch", "merge", "Report",
    "Run", "execute", "load_run", "Corpus", "Harvest", "Live", "Store", "harvest", "Training", "train", "Recipe",
    "evaluate_dictionary", "Architecture", "Codebook", "CodebookPatch", "Ban", "StandardArchitecture",
    "GatedArchitecture", "JumpreluArchitecture", "TopkArchitecture", "BatchtopkArchitecture",
    "MatryoshkaBatchtopkArchitecture", "CodebookArchitecture",
    "Objective", "GA", "WGA", "SatImp", "Hinge", "CappedGA", "TemperatureGA", "NPO", "TNPO", "WTNPO", "SimNPO", "DPO",
    "IDK", "ME", "UNDIAL", "CEU", "Margin", "RMU", "RetainNLL", "RetainKL", "RetainEmbedding", "AnswerPreservation",
    "Attack", "Outcome", "attack", "Dilute", "Extraction", "InContext", "JailbreakPrefix", "LinearProbe", "LogitLens",
    "MultiTurn", "Paraphrase", "Prefill", "Quantise", "Relearn", "RolePlay", "Translate", "Benchmark", "Line",
    "UnlearningScore", "MUSE", "TOFU", "MultipleChoice", "Survey", "known_to", "overlaps", "sae_bench", "Measured",
    "Metric", "Asked", "View", "RetainedMetric", "RetainedUtility", "Comparison", "retrain", "teach", "Entry",
    "Optimisation", "AnswerLogprob", "Average", "ChoiceAccuracy", "ConditionalProbability", "Consistency",
    "CosineSimilarity", "EmbeddingAccuracy", "Entailment", "ExactMemorisation", "ExtractionStrength",
    "ForgetEfficacy", "ForgetQuality", "Gap", "GeneratedAccuracy", "Gibberish", "MembershipAUC",
    "MembershipClassifier", "ModelUtility", "Perplexity", "PrivLeak", "Probability", "RankedAccuracy", "Repetitive",
    "Rouge", "TokenEntropy", "Touched", "TruthRatio", "closer_look_utility", "normalised_improvement_drop",
    "retrain_gap", "robustness", "tofu_utility", "wagle_efficacy", "wagle_utility", "wmdp_efficacy",
    "SwitchOff", "SoftPrompt", "inputs_of", "union",
    "Mask", "WeightScore", "GradientWeightScore", "MagnitudeWeightScore", "RandomWeightScore",
    "SnipWeightScore", "WagleWeightScore", "WandaWeightScore", "CRISP", "Distil", "Difference", "difference",
    "Follow", "LowerFeatures", "Negate", "SplitMerge", "Sequential", "SequenceReport", "SequenceRun", "load_sequence",
    "BlackBox", "Corrupt", "Prefix", "PrefixPatch", "PromptPatch", "Offset", "LogitPatch",
    "Expert", "ExpertPatch", "EUL", "Depart", "AdapterPatch", "fuse",
    "Choice", "Inspection", "inspect_features", "Effect", "effect_alone", "Labeller", "Explanation", "explain",
]  # fmt: skip
FAMILIES = [Edit, Gate, Score, Method, Architecture, Objective, Attack, Benchmark, Metric, WeightScore]
MEMBERS = [(family, member) for family in FAMILIES for member in family.members.values()]
GIVEN = {
    "scale": {"by": -6.0},
    "shift": {"by": Relative(-0.5)},
    "mean": {"values": (0.1, 0.2)},
    "suppress": {"dictionaries": ("a",), "edit": {"kind": "clamp", "to": {"of_norm": -0.5}}, "gate": "probe"},
    "ban": {"codebook": "a", "n": 3, "mode": "zero"},
    **{kind: {"d_sae": 8} for kind in ("standard", "gated", "jumprelu", "topk", "batchtopk")},
    "matryoshka_batchtopk": {"d_sae": 8, "matryoshka_widths": (2, 8)},
    "finetune": {"objectives": ({"kind": "npo", "beta": 0.5}, "retain_nll"), "lr": 2e-5, "watch": {"keep": 0.9}},
    "crisp": {"dictionaries": ("a",), "adapter": None},
    "distil": {"teacher": {"preset": "dsg", "dictionaries": ("a",)}, "held_out": 0.2},
    "lower_features": {"dictionary": "a", "features": (1, 2)},
    "concept": {"scope": "chess"},
    "survey": {"scope": "astronomy"},
    "multiple_choice": {"forget": "cais/wmdp/wmdp-bio"},
    "gibberish": {"sets": ("forget",)},
    "gap": {"of": {"kind": "probability"}},
    "average": {"terms": ({"kind": "probability"},)},
    "model_utility": {"terms": ({"kind": "probability", "on": "retain"},)},
    "split_merge": {"method": {"kind": "negate", "lr": 2e-5}, "by": "author", "weights": {"198": 0.5}},
    "offset": {"small": "somewhere", "adapter": {"r": 4}, "alpha": 0.5},
    "eul": {"layers": (7, 8), "gate": "probe", "labels": {"yes": ("Yes",), "no": ("No",)}},
    "expert": {"layers": (3, 5), "width": 16, "routing": {"false_positives": 0.05}},
    "steer": {"sites": ("resid_post.1",), "edit": {"kind": "shift", "by": -2}},
}


def test_exactly_these_names_are_public():
    found = {n for n, v in vars(concept_unlearn).items() if not (n.startswith("_") or isinstance(v, ModuleType))}
    assert found == set(EXPORTED)


@pytest.mark.parametrize("name", [n for n in EXPORTED if n != "PRESETS"])
def test_every_public_name_has_words_of_its_own(name):
    written = vars(concept_unlearn)[name].__doc__
    assert written
    assert not written.startswith(f"{name}(")  # what dataclasses and named tuples write for themselves


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_every_member_of_a_family_is_public(family):
    assert {m.__name__ for m in family.members.values()} <= set(EXPORTED)


@pytest.mark.parametrize(("family", "member"), MEMBERS, ids=lambda c: c.__name__)
@pytest.mark.parametrize(
    ("dump", "load"), [(json.dumps, json.loads), (yaml.safe_dump, yaml.safe_load)], ids=["json", "yaml"]
)
def test_every_component_survives_a_file(family, member, dump, load):
    made = member(**GIVEN.get(member.kind, {}))
    assert family.parse(load(dump(made.spec()))) == made


@pytest.mark.parametrize("name", ["py.typed", "report/report.html.j2", "data/concepts/_shared/retain.jsonl"])
def test_what_is_not_code_is_shipped(name):
    assert (importlib.resources.files("concept_unlearn") / name).is_file()


def test_importing_is_silent_and_imports_no_slow_library():
    code = "import sys, concept_unlearn; print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert "torch" in loaded
    assert not loaded & {"sae_lens", "transformer_lens", "transformers", "datasets", "matplotlib", "wandb"}
