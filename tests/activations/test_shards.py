"""A shard's rows are the model's activations on its text, whatever the batches."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import BOS, D_MODEL, EOS, PAD, VOCAB, make_hf, make_tokenizer, words
from workers import SITES, ask, peak_memory, tiny_corpus, tiny_harvest, tiny_lm

from concept_unlearn import LM, Corpus
from concept_unlearn.activations import Live
from concept_unlearn.activations.shards import cut, read
from concept_unlearn.activations.stream import n_rows
from concept_unlearn.errors import EmptyData
from concept_unlearn.lm import Site

FIRST = Site.parse(SITES[0])


def rows_of(lm, corpus, harvest, **settings):
    shards = [read(lm, texts, harvest, **settings) for texts in cut(lm, corpus, harvest)]
    return {site: torch.cat([s[site] for s in shards]) for site in harvest.sites}


def test_rows_are_the_activations_one_text_at_a_time(lm):
    corpus, harvest = tiny_corpus(20), tiny_harvest()
    found = rows_of(lm, corpus, harvest)
    expected = {site: [] for site in harvest.sites}
    for texts in cut(lm, corpus, harvest):
        for ids in texts.ids:
            row = torch.tensor([ids])
            for site, x in lm.activations(row, torch.ones_like(row, dtype=torch.bool), *harvest.sites).items():
                expected[site].append(x[0][row[0] != BOS])
    for site in harvest.sites:
        torch.testing.assert_close(found[site], torch.cat(expected[site]), rtol=1e-4, atol=1e-5)


def test_batches_do_not_matter(lm):
    a, b = (rows_of(lm, tiny_corpus(20), tiny_harvest(), batch_tokens=n) for n in (16, 500))
    for site in a:
        torch.testing.assert_close(a[site], b[site], rtol=1e-4, atol=1e-5)


def test_shard_size_does_not_matter_to_the_set_of_rows(lm):
    a, b = (rows_of(lm, tiny_corpus(20), tiny_harvest(shard_tokens=n)) for n in (50, 10_000))
    for site in a:
        torch.testing.assert_close(a[site], b[site], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 199, 200, 201, 777])
def test_exactly_as_many_rows_as_asked_for(lm, tokens):
    found = rows_of(lm, tiny_corpus(100), tiny_harvest(tokens=tokens))
    assert {len(x) for x in found.values()} == {tokens}
    shards = list(cut(lm, tiny_corpus(100), tiny_harvest(tokens=tokens)))
    assert [s.last for s in shards] == [False] * (len(shards) - 1) + [True]


def test_a_corpus_that_ends_early_is_taken_whole(lm):
    corpus = tiny_corpus(10)
    total = sum(len(document.split()) for document in corpus if len(document.split()) > 1)
    assert len(rows_of(lm, corpus, tiny_harvest(tokens=10**6, context=64))[FIRST]) == total


def test_a_document_longer_than_the_context_is_cut_and_loses_nothing(lm):
    corpus = Corpus.of([words(*range(7, 45))])
    (texts,) = cut(lm, corpus, tiny_harvest(context=10))
    assert [i for ids in texts.ids for i in ids] == list(range(7, 45))
    assert max(map(len, texts.ids)) == 10


def test_every_piece_opens_with_bos_where_the_tokenizer_does_so():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    (texts,) = cut(LM(make_hf(), tokenizer), Corpus.of([words(*range(7, 31))]), tiny_harvest(context=9))
    assert [ids[0] for ids in texts.ids] == [BOS] * 3
    assert [len(ids) for ids in texts.ids] == [9, 9, 9]
    assert texts.n_rows == 24


def test_what_every_chat_begins_with_is_left_out(lm):
    head = lm.chat_head
    assert head
    assert n_rows([*head, 7, 8], BOS, head) == 2
    corpus = Corpus.of([lm.tokenizer.decode(head) + " w7 w8", words(7, 8, 9)])
    assert len(rows_of(lm, corpus, tiny_harvest())[FIRST]) == 5


def test_a_live_source_gives_each_of_several_processes_its_own_shards():
    live = Live(tiny_lm(), tiny_corpus(), tiny_harvest())
    whole = [s[FIRST] for s in live.shards(0, 0, 1)]
    dealt = [[s[FIRST] for s in live.shards(0, rank, 3)] for rank in range(3)]
    assert sum(map(len, dealt)) == len(whole)
    for i, rows in enumerate(whole):
        assert torch.equal(dealt[i % 3][i // 3], rows)


@pytest.mark.parametrize("texts", [[], [""], ["", "w7"]])
def test_a_corpus_without_a_token_to_read_is_refused(lm, texts):
    with pytest.raises(EmptyData, match="texts"):
        list(cut(lm, Corpus.of(texts), tiny_harvest()))


def test_the_decoder_of_an_encoder_decoder_is_harvested_too():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=D_MODEL, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=PAD,
        pad_token_id=PAD, eos_token_id=EOS, dropout_rate=0.0,
    )  # fmt: skip
    t5 = LM(transformers.T5ForConditionalGeneration(config).eval(), make_tokenizer())
    corpus, harvest = Corpus.of([words(7, 8, 9), words(10, 11, 12, 13, 14)]), tiny_harvest()
    found = rows_of(t5, corpus, harvest)
    assert found[FIRST].shape == (8, D_MODEL)
    alone = rows_of(t5, Corpus.of([words(7, 8, 9)]), harvest)
    torch.testing.assert_close(found[FIRST][:3], alone[FIRST], rtol=1e-4, atol=1e-5)


def test_memory_stays_flat_over_a_long_stream():
    short, long = ask(peak_memory, 5), ask(peak_memory, 20)
    assert long - short < 8  # MB; 15 shards more would be 19
