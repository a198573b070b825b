"""Every message that a user can see has the one form, and docs/messages.md lists it."""

import re

from docs.messages import CAUSES, PAGE, collect, render

FORM = re.compile(r"^[\w{}]+: .+ must .+, got .+", re.DOTALL)

# messages of another form, each with its reason
EXCEPTIONS = {
    # printed with the command's name in front: several have this option or argument
    "run must be a run folder or a checkpoint, got nothing at {run}; fastvae train writes one",
    "run must be a run folder or a checkpoint, got {got} at {run}; the run comes first",
    "device must be cpu or cuda, got {name}",
    "device must be cpu where torch finds no GPU, got {name}",
    # the two sides of a comparison, neither of which is an argument that could be mended
    "checkpoint has {n_items} items, data has {len(items)}: {run} was trained on other data",
    "checkpoint has other items than the data, which has {other}: {run} was trained on other data",
    # a property of all users together
    "evaluate: no evaluable users among {len(n_fold_in)}: each has an empty row in fold_in or in held_out; "
    "hold out more clicks per user or more users",
    # something is missing on the machine, not wrong in the call: say what to install
    "events: reading a click log needs polars, which is missing; run pip install 'fastvae-cf[cli]'",
    "write_recommendations: Parquet needs polars; run pip install 'fastvae-cf[cli]'",
    "recbole: the models need RecBole, which is missing; run pip install 'fastvae-cf[recbole]'",
    "lenskit: the scorers need LensKit, which is missing; run pip install 'fastvae-cf[lenskit]'",
    "write_user_values: Parquet needs polars; run pip install 'fastvae-cf[cli]'",
    "fit: progress must be False without rich; pip install 'fastvae-cf[cli]'",
    "{op}: a GPU needs triton, which is missing; pip install triton, or move clicks and model to the CPU",
    "movielens_100k: pip could not fetch the data into {cache} ({type(error).__name__}); check the network, "
    "or use events of your own",
    # {argument} is "path must end in ..., got ..." or "format must be ..., got ..."
    "write_recommendations: {argument}",
    # warnings: the call goes on
    "recommend: {n_unknown} of {log.x.nnz} clicks in frame are on items that the model does not know, such as {unknown}; "
    "they are ignored",
    "recommend: {sum(lost.values())} of {log.info['n_events']} rows of frame are no clicks, {reasons}",
    "{where}: {unknown.sum()} of {len(flat)} clicks in histories are on items that the model does not "
    "know{names and f', such as {names}'}; they are ignored",
    "recommend: {len(found) - len(known)} of {len(found)} ids in {name} are of items that the model does not know, such "
    "as {unknown}; they are ignored",
    "recommend: allowed and exclude leave no item, so that every list is empty",
    # Ctrl-C: no error
    "stopped after {n} trials; saved in {path}, the same command goes on",
    "fastvae: the training step could not be captured as a CUDA graph, eager steps go on ({reason})",
}  # fmt: skip


def whole_messages():
    return [message for message in collect() if not message.is_reason]


def test_every_message_says_where_what_must_be_and_what_was_got():
    others = {m.text for m in whole_messages() if not FORM.match(m.text)}
    assert others - EXCEPTIONS == set(), "give them the form, or list them here with a reason"
    assert EXCEPTIONS - others == set(), "no longer there"


def test_a_message_is_one_sentence_without_a_full_stop():
    for message in collect():
        assert "\n" not in message.text and not message.text.endswith("."), message.text


def test_every_module_with_messages_has_a_cause():
    for message in collect():
        assert any(message.module.startswith(prefix) for prefix in CAUSES), message.module


def test_the_page_is_what_the_source_says():
    page = render()
    assert PAGE.read_text(encoding="utf-8") == page, "run python -m docs.messages"
    for message in collect():
        assert " ".join(message.text.split()).replace("|", "\\|").replace("`", "'") in page
