from dataclasses import replace

from tome_server.calibration.tuning import Kept, Tuned
from tome_server.cli.tables import profile_table, quality_table, tuning_table
from tome_server.scheduling.measured import Measured
from tome_server.scheduling.profile import Profile

PROFILE = Profile(
    sizes=(1, 16),
    rs=(0, 12),
    p50=((0.0135, 0.0121), (0.2, 0.1)),
    p95=((0.0142, 0.0129), (0.21, 0.12)),
    extra_group=0.00123,
)
LINES = """\
batch              r=0   r=12
    1  p50 ms     13.5   12.1
       p95 ms     14.2   12.9
       images/s   74.1   82.6
   16  p50 ms    200.0  100.0
       p95 ms    210.0  120.0
       images/s   80.0  160.0
batches of several r are faster packed; each further r adds 1.2 ms
"""


def test_latency_and_throughput_by_batch_size_and_r() -> None:
    assert profile_table(PROFILE) == LINES


def test_how_batches_of_several_r_run_is_said() -> None:
    assert profile_table(replace(PROFILE, one_call=False)).endswith(
        "\nbatches of several r are faster split, one call for each r\n"
    )


def test_an_r_that_gains_nothing_is_said_to_be_predicted_at_the_lesser_ones_cost() -> None:
    lowered = replace(PROFILE, p50=((0.0121, 0.0121), (0.2, 0.1)))
    note = "where neighbours are equal, the larger r was no faster, and is predicted to take as long as the smaller"
    assert note in profile_table(lowered).splitlines()
    assert note not in profile_table(PROFILE)


def test_a_profile_that_was_measured_on_a_busy_machine_is_said_to_be() -> None:
    assert profile_table(replace(PROFILE, measured=Measured(rounds=5, load=0.05, spread=1.1))) == LINES
    assert profile_table(replace(PROFILE, measured=Measured(rounds=5, load=0.37, spread=1.1))) == LINES + (
        "measured while the machine was busy (37% of the time waiting for a CPU); it will be measured again\n"
    )


def test_quality_by_r() -> None:
    levels = [
        {"r": 0, "macs": 2_000_000_000, "top1": 0.9049, "agreement": 1.0},
        {"r": 14, "macs": 1_000_000_000, "top1": None, "agreement": 0.98765},
    ]
    assert quality_table(levels) == (
        " r  GMACs  saved   top-1  agreement\n"
        " 0  2.000   0.0%  0.9049     1.0000\n"
        "14  1.000  50.0%       -     0.9877\n"
    )  # fmt: skip


def test_schedules_and_what_they_are_compared_with() -> None:
    constant, tuned = Kept(shifted=0.02, agreement=0.9, top1=None), Kept(shifted=0.01, agreement=0.95, top1=None)
    found = [Tuned(8, (9, 7), 1_900_000_000, 2_000_000_000, tuned, constant, -0.01, 0.002)]
    unlabelled = tuning_table(found)
    assert unlabelled.startswith(
        "r  GMACs  shifted  agreement  tokens merged by block\n"
        "8  2.000  0.02000     0.9000  r in every block\n"
        "   1.900  0.01000     0.9500  9 7   -0.01000 ± 0.00200\n"
    )
    labelled = [replace(found[0], constant=replace(constant, top1=0.8), tuned=replace(tuned, top1=0.81))]
    assert tuning_table(labelled).startswith(
        "r  GMACs  shifted  agreement   top-1  tokens merged by block\n"
        "8  2.000  0.02000     0.9000  0.8000  r in every block\n"
        "   1.900  0.01000     0.9500  0.8100  9 7   -0.01000 ± 0.00200\n"
    )
