import random
from dataclasses import fields
from math import isclose, isnan
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from workers.scrape.engines import ENGINES, SGLANG, TRTLLM, VLLM, XLLM, Combine, Engine, engine_named
from workers.scrape.page import ABSENT, Histogram, KnownLines, PageReader, Sample
from workers.scrape.plausibility import bounds

FIXTURES = Path(__file__).parents[2] / "fixtures" / "vllm-0.32"
CAPTURES = [(FIXTURES / name).read_bytes() for name in ("metrics-after-4-requests.txt", "metrics-after-evictions.txt")]


def read(page: bytes, engine: Engine = VLLM) -> Sample:
    return PageReader(KnownLines(engine)).read(page)


def same(a: float, b: float) -> bool:
    return (isnan(a) and isnan(b)) or a == b or isclose(a, b, rel_tol=1e-9)


def differences(a: Sample, b: Sample) -> list[str]:
    """Names of the attributes in which two samples differ."""
    names = []
    for name in (field.name for field in fields(Sample) if field.name != "implausible"):
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, Histogram):
            equal = (
                x.bounds == y.bounds
                and len(x.counts) == len(y.counts)
                and all(map(same, x.counts, y.counts))
                and same(x.sum, y.sum)
                and same(x.count, y.count)
            )
        elif isinstance(x, float):
            equal = same(x, y)
        else:
            equal = x == y
        if not equal:
            names.append(f"{name}: {x} != {y}")
    return names


def plausible(name: str, number: float) -> float:
    return number if 0 <= number <= bounds([name])[0] else float("nan")


def as_prometheus_client_reads(page: bytes, engine: Engine = VLLM) -> Sample:
    """The same numbers, taken from a page the plain way: parse everything, then filter and add up."""
    text = page.decode()
    whole = text[: text.rfind("\n") + 1]
    rest = text[len(whole) :]
    series = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(whole)
        for sample in family.samples
    }
    wanted = {source.name for scalar in engine.scalars for source in scalar.sources}
    result = Sample(truncated=bool(rest) and rest.strip() != "# EOF")
    for scalar in engine.scalars:
        for source in scalar.sources:
            numbers = []
            for (name, labels), value in series.items():
                if name == source.name and set(source.where) <= set(labels):
                    if source.label:
                        try:
                            value = float(dict(labels).get(source.label, ""))
                        except ValueError:
                            value = float("nan")
                    numbers.append(value)
            if numbers:
                match scalar.combine:
                    case Combine.SUM:
                        number = sum(numbers)
                    case Combine.MEAN:
                        number = sum(numbers) / len(numbers)
                    case Combine.MAX:
                        number = max((n for n in numbers if not isnan(n)), default=float("nan"))
                setattr(result, scalar.quantity, plausible(scalar.quantity, float(number)))
                break
    for distribution in engine.distributions:
        for base in distribution.names:
            wanted |= {base + "_sum", base + "_count"}
            if distribution.buckets:
                wanted.add(base + "_bucket")
        for base in distribution.names:
            counts = [value for (name, _), value in series.items() if name == base + "_count"]
            if not counts:
                continue
            sums = [value for (name, _), value in series.items() if name == base + "_sum"]
            buckets: dict[float, float] = {}
            for (name, labels), value in series.items():
                if name == base + "_bucket" and distribution.buckets:
                    bound = float(dict(labels)["le"])
                    buckets[bound] = buckets.get(bound, 0.0) + value
            limits = tuple(sorted(buckets))
            total = sum(sums) if sums else float("nan")
            histogram = Histogram(
                limits,
                [buckets[limit] for limit in limits],
                plausible(f"{distribution.quantity}.sum", total),
                plausible(f"{distribution.quantity}.count", sum(counts)),
            )
            setattr(result, distribution.quantity, histogram)
            break
    result.found = sum(name in wanted for name, _ in series)
    return result


@pytest.mark.parametrize("page", CAPTURES)
def test_a_captured_page_says_what_prometheus_client_says(page: bytes) -> None:
    assert differences(read(page), as_prometheus_client_reads(page)) == []


def test_a_captured_page_has_the_numbers_of_its_engine() -> None:
    sample = read(CAPTURES[1])
    assert (sample.running, sample.waiting, sample.kv_usage, sample.awake) == (0.0, 0.0, 0.0, 1.0)
    assert (sample.prompt_tokens, sample.computed_prompt_tokens, sample.generation_tokens) == (4707.0, 4323.0, 272.0)
    assert (sample.prefix_queries, sample.prefix_hits, sample.preemptions) == (4707.0, 384.0, 0.0)
    assert (sample.finished, sample.finished_length, sample.finished_stop) == (17.0, 17.0, 0.0)
    assert (sample.block_size, sample.num_gpu_blocks, sample.kv_cache_tokens) == (32.0, 48.0, 1536.0)
    assert sample.start_time_seconds == 1.79540293691e09
    assert (sample.ttft.count, sample.step_tokens.count, sample.step_tokens.sum) == (17.0, 272.0, 4595.0)
    assert sample.ttft.bounds[0] == 0.001 and sample.ttft.bounds[-1] == float("inf")
    assert sample.ttft.counts[-1] == sample.ttft.count
    assert isnan(sample.swapped) and not sample.truncated


def test_a_known_page_gives_its_new_numbers() -> None:
    reader = PageReader(KnownLines(VLLM))
    for page in (*CAPTURES, *reversed(CAPTURES)):
        assert differences(reader.read(page), read(page)) == []


class Page:
    """A page that can be changed by family and by line. Numbers stay the last word of their line."""

    def __init__(self, page: bytes) -> None:
        self.families = ["# HELP " + block for block in page.decode().split("# HELP ")[1:]]

    def lines(self) -> list[str]:
        return "".join(self.families).splitlines()


NUMBERS = ["0", "1.0", "17", "2.5e3", "1E-9", "NaN", "+Inf", "-Inf", "0x1", "1.7954028910452704e+09"]
LABELS = [
    'pod="a"',
    'pod="a}b"',
    r'pod="say \"} 7\" \\"',
    r'note="two\nlines 3.0"',
    'note="# HELP vllm:num_requests_running"',
    'note="é"',
]


def mutated(page: bytes, random_: random.Random) -> bytes:
    """A page that is still valid, but looks different in several ways at once."""
    families = Page(page).families
    ways = random_.sample(["shuffle", "ranks", "drop", "numbers", "labels", "timestamps", "crlf", "spaces"], 3)
    if "shuffle" in ways:
        random_.shuffle(families)
    if "ranks" in ways:
        families = [
            family
            + "".join(x for x in family.splitlines(True) if 'engine="0"' in x).replace('engine="0"', 'engine="1"')
            for family in families
        ]
    lines = "".join(families).splitlines()
    if "drop" in ways:
        share = random_.choice((0.01, 0.3))
        lines = [line for line in lines if random_.random() > share]
    result = []
    label = random_.choice(LABELS)
    for line in lines:
        if not line.startswith("#"):
            series, _, number = line.rpartition(" ")
            if "numbers" in ways and random_.random() < 0.1:
                number = random_.choice([n for n in NUMBERS if n != "0x1"])
            if "labels" in ways and random_.random() < 0.5:
                if "{" in series:
                    opening, _, rest = series.partition("{")
                    series = f"{opening}{{{label},{rest}" if random_.random() < 0.5 else f"{series[:-1]},{label}}}"
                else:
                    series = f"{series}{{{label}}}"
            if "timestamps" in ways and random_.random() < 0.5:
                number += " 1395066363000"
            gap = "  " if "spaces" in ways and random_.random() < 0.5 else " "
            line = series + gap + number
        result.append(line)
    end = "\r\n" if "crlf" in ways else "\n"
    return "".join(line + end for line in result).encode()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32).map(random.Random), st.sampled_from(CAPTURES))
def test_any_valid_page_says_what_prometheus_client_says(random_: random.Random, page: bytes) -> None:
    known = KnownLines(VLLM)
    reader = PageReader(known)
    reader.read(page)
    other = mutated(page, random_)
    expected = as_prometheus_client_reads(other)
    assert differences(reader.read(other), expected) == []
    assert differences(reader.read(other), expected) == []  # now by its layout
    assert differences(PageReader(known).read(other), expected) == []
    assert differences(reader.read(page), read(page)) == []


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(CAPTURES), st.data())
def test_a_page_cut_anywhere_gives_its_whole_lines(page: bytes, data: st.DataObject) -> None:
    cut = page[: data.draw(st.integers(0, len(page)))]
    known = KnownLines(VLLM)
    reader = PageReader(known)
    reader.read(page)
    assert differences(reader.read(cut), as_prometheus_client_reads(cut)) == []
    assert reader.read(cut).truncated == (cut[-1:] not in (b"", b"\n"))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(CAPTURES), st.data())
def test_a_layout_never_changes_what_a_broken_page_says(page: bytes, data: st.DataObject) -> None:
    """Broken in any way: a reader that knows the whole page reads it as one that has seen none."""
    random_ = data.draw(st.integers(0, 2**32).map(random.Random))
    lines = page.split(b"\n")
    for _ in range(data.draw(st.integers(1, 3))):
        at, other = random_.randrange(len(lines)), random_.randrange(len(lines))
        line = lines[at]
        match random_.randrange(6):
            case 0:
                lines[at] = lines[other]
            case 1:
                lines[at], lines[other] = lines[other], line
            case 2:
                where = random_.randrange(len(line) + 1)
                lines[at] = line[:where] + random_.choice([b"", b"\n", b" ", b'"', b"}", b"\\", b"\t"]) + line[where:]
            case 3:
                lines[at] = line[: random_.randrange(len(line) + 1)]
            case 4:
                lines[at] = b" " + line
            case 5:
                lines[at] = random_.randbytes(20)
    broken = b"\n".join(lines)
    reader = PageReader(KnownLines(VLLM))
    reader.read(page)
    expected = read(broken)
    assert differences(reader.read(broken), expected) == []
    assert differences(reader.read(broken), expected) == []
    assert differences(reader.read(page), read(page)) == []


@pytest.mark.parametrize(
    "page",
    [
        b"",
        b"\n\n\n",
        b"<!DOCTYPE html>\n<html><body>\n<h1>502 Bad Gateway</h1>\n</body></html>\n",
        b"# HELP vllm:num_requests_running 7\n# vllm:num_requests_running 7\n",
        bytes(range(256)) * 4,
        b"vllm:num_requests_running\n",
        b'vllm:num_requests_running{engine="0"\n',
        b'vllm:num_requests_running{engine="0"}\n',
        b'vllm:num_requests_running{engine="0"} many\n',
        b'vllm:num_requests_running{engine="0} 3\n',
    ],
)
def test_a_page_with_nothing_of_the_engine_gives_nothing(page: bytes) -> None:
    reader = PageReader(KnownLines(VLLM))
    for sample in (reader.read(page), reader.read(page)):
        assert sample.found == 0
        assert isnan(sample.running) and sample.ttft is ABSENT


def test_a_name_that_begins_another_is_not_taken_for_it() -> None:
    page = (
        b'vllm:num_requests_waiting_by_reason{reason="capacity"} 5\n'
        b'vllm:num_requests_waiting_by_reason{reason="deferred"} 2\n'
        b"vllm:num_requests_waiting 7\n"
        b"vllm:num_requests_waiting_ever 100\n"
    )
    sample = read(page)
    assert (sample.waiting, sample.waiting_deferred) == (7.0, 2.0)


def test_what_is_additive_is_added_over_ranks_and_the_rest_averaged() -> None:
    page = b"".join(
        b'vllm:num_requests_running{engine="%d"} %d\n'
        b'vllm:kv_cache_usage_perc{engine="%d"} 0.%d\n'
        b'vllm:cache_config_info{block_size="16",engine="%d",num_gpu_blocks="100"} 1\n' % (i, i, i, i, i)
        for i in range(4)
    )
    sample = read(page)
    assert (sample.running, sample.block_size, sample.num_gpu_blocks) == (6.0, 16.0, 400.0)
    assert isclose(sample.kv_usage, 0.15)


def test_an_old_name_counts_only_where_the_new_one_is_missing() -> None:
    new, old = b"vllm:kv_cache_usage_perc 0.2\n", b"vllm:gpu_cache_usage_perc 0.6\n"
    assert read(old + new).kv_usage == 0.2
    assert read(old).kv_usage == 0.6


def test_ranks_of_a_histogram_with_different_bounds_are_added_by_bound() -> None:
    name = b"vllm:time_to_first_token_seconds"
    page = b"".join(
        b'%s_bucket{engine="%d",le="%s"} %d\n' % (name, engine, bound, value)
        for engine, bound, value in ((0, b"1.0", 1), (0, b"+Inf", 2), (1, b"0.5", 3), (1, b"1.0", 4), (1, b"+Inf", 5))
    ) + b'%s_count{engine="0"} 2\n%s_count{engine="1"} 5\n%s_sum 9.5\n' % (name, name, name)
    ttft = read(page).ttft
    assert (ttft.bounds, ttft.counts) == ((0.5, 1.0, float("inf")), [3.0, 5.0, 7.0])
    assert (ttft.count, ttft.sum) == (7.0, 9.5)


@pytest.mark.parametrize("number", ["+Inf", "-Inf", "-1", "1e300", "1e17"])
@pytest.mark.parametrize(
    ("series", "quantity"),
    [
        ("vllm:num_requests_waiting", "waiting"),
        ("vllm:kv_cache_usage_perc", "kv_usage"),
        ("vllm:generation_tokens_total", "generation_tokens"),
        ("vllm:avg_generation_throughput_toks_per_s", "generation_throughput"),
    ],
)
def test_what_cannot_be_true_is_absent_and_named(series: str, quantity: str, number: str) -> None:
    reader = PageReader(KnownLines(VLLM))
    pages = [f"vllm:num_requests_running 3\n{series} {said}\n".encode() for said in ("0.5", number, "0.5")]
    samples = [reader.read(page) for page in pages]
    assert [getattr(one, quantity) for one in (samples[0], samples[2])] == [0.5, 0.5]
    assert isnan(getattr(samples[1], quantity))
    assert [one.implausible for one in samples] == [(), (quantity,), ()]
    assert [one.running for one in samples] == [3.0, 3.0, 3.0]


def test_nothing_on_a_captured_page_is_disbelieved() -> None:
    assert [read(page).implausible for page in CAPTURES] == [(), ()]


def test_not_a_number_is_no_news() -> None:
    assert read(b"vllm:num_requests_running NaN\n").implausible == ()


def test_a_histogram_that_cannot_be_true_is_absent() -> None:
    histogram = read(b"vllm:e2e_request_latency_seconds_sum 7\nvllm:e2e_request_latency_seconds_count 1e300\n").e2e
    assert histogram.sum == 7.0
    assert isnan(histogram.count)


def test_blanks_around_a_line_do_not_count() -> None:
    reader = PageReader(KnownLines(VLLM))
    page = (
        b'  vllm:num_requests_running\t{ engine = "0" , pod="a", }  3\t\n'
        b"\t# TYPE x gauge\n \n\tvllm:num_requests_waiting 2\n"
    )
    for sample in (reader.read(page), reader.read(page)):
        assert (sample.running, sample.waiting) == (3.0, 2.0)


def test_openmetrics_exemplars_and_the_end_mark_are_no_obstacle() -> None:
    reader = PageReader(KnownLines(VLLM))
    page = (
        b"# TYPE vllm:prompt_tokens counter\n"
        b'vllm:prompt_tokens_total{engine="0"} 17.0 1520879607.789 # {trace_id="a b"} 0.5\n'
        b'vllm:prompt_tokens_created{engine="0"} 1.5e9\n'
        b"# EOF"
    )
    for sample in (reader.read(page), reader.read(page)):
        assert (sample.prompt_tokens, sample.start_time_seconds, sample.truncated) == (17.0, 1.5e9, False)


def test_a_label_says_none_where_the_engine_has_not_decided() -> None:
    assert isnan(read(b'vllm:cache_config_info{block_size="16",num_gpu_blocks="None"} 1.0\n').num_gpu_blocks)


def test_sglang_reports_the_same_work_once() -> None:
    def line(name: str, value: float, **labels: str) -> str:
        inner = ",".join(f'{key}="{text}"' for key, text in labels.items())
        return f"sglang:{name}{{{inner}}} {value}\n"

    page = (
        line("num_running_reqs", 3, tp_rank="0", pp_rank="0", dp_rank="0")
        + line("num_running_reqs", 3, tp_rank="1", pp_rank="0", dp_rank="0")
        + line("num_running_reqs", 4, tp_rank="2", pp_rank="0", dp_rank="1")
        + line("num_queue_reqs", 5, tp_rank="0", priority="")
        + line("num_queue_reqs", 2, tp_rank="0", priority="1")
        + line("num_queue_reqs", 3, tp_rank="0", priority="2")
        + line("token_usage", 0.5)
        + line("cached_tokens_total", 10, cache_source="device")
        + line("cached_tokens_total", 5, cache_source="host")
        + line("cache_config_info", 1, page_size="64", num_pages="1000")
    )
    sample = read(page.encode(), SGLANG)
    assert (sample.running, sample.waiting, sample.kv_usage) == (7.0, 5.0, 0.5)
    assert (sample.prefix_hits, sample.block_size, sample.num_gpu_blocks) == (15.0, 64.0, 1000.0)


def test_tensorrt_llm_and_xllm_have_their_own_names() -> None:
    page = (
        b'trtllm_num_requests_running{model_name="m"} 3\ntrtllm_num_requests_waiting 1\n'
        b"trtllm_kv_cache_utilization 0.25\ntrtllm_kv_cache_tokens_per_block 32\ntrtllm_kv_cache_max_blocks 500\n"
        b"trtllm_time_to_first_token_seconds_sum 2.0\ntrtllm_time_to_first_token_seconds_count 4\n"
        b'trtllm_request_success_total{finished_reason="stop"} 4\nengine_utilization 0.75\n'
    )
    for engine in (TRTLLM, XLLM):
        sample = read(page, engine)
        assert (sample.running, sample.waiting, sample.kv_usage, sample.finished_stop) == (3.0, 1.0, 0.25, 4.0)
        assert (sample.ttft.sum, sample.ttft.count, sample.ttft.counts) == (2.0, 4.0, [])
    assert read(page, XLLM).utilization == 0.75 and isnan(read(page, TRTLLM).utilization)
    assert read(page, TRTLLM).block_size == 32.0


def test_pods_with_equal_pages_share_one_layout() -> None:
    known = KnownLines(VLLM)
    readers = [PageReader(known) for _ in range(3)]
    for reader in readers:
        reader.read(CAPTURES[0])
    assert len({id(reader._layout) for reader in readers}) == 1
    del reader, readers
    assert len(known.layouts) == 0


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.scrape.page.KNOWN_LINES_MAX", 100)
    known = KnownLines(VLLM)
    reader = PageReader(known)
    for i in range(300):
        reader.read(b'vllm:num_requests_running{pod="%d"} 1\nhttp_requests{id="%d"} 1\n' % (i, i))
        reader.read(b'vllm:num_requests_running{pod="%s"} 1\n' % (b"x" * 5_000))
    assert len(known._known) <= 100
    assert max(map(len, known._known)) < 100
    assert len(known.layouts) == 1


def test_every_engine_fills_only_what_a_sample_has() -> None:
    names = {field.name for field in fields(Sample)}
    for engine in ENGINES.values():
        quantities = [scalar.quantity for scalar in engine.scalars] + [d.quantity for d in engine.distributions]
        assert set(quantities) <= names
        assert len(set(quantities)) == len(quantities)


def test_engines_are_found_by_name() -> None:
    assert engine_named("") is VLLM and engine_named(" VLLM ") is VLLM and engine_named("tensorrt-llm") is TRTLLM
    with pytest.raises(ValueError, match=r"'llama\.cpp' is not known: use one of sglang"):
        engine_named("llama.cpp")
