"""Which tests the lane runs, as pytest's arguments."""

from __future__ import annotations

_INTEGRATION = "tests/integration"
#: tests that need what only the lane has, so that CI runs them; tests/unit/test_kvm_lane.py sees that none is forgotten
SHORT = (f"{_INTEGRATION}/test_kvm.py", f"{_INTEGRATION}/test_kvm_vsock.py")
#: tests of the same things that run under TCG too, and here under KVM: an hour in a guest
_MORE = ("cli", "main_job", "pod_lifecycle", "succession", "templates", "warm_pool")
#: made for what a machine can do in minutes that takes a nested guest an hour
_TOO_LONG = (
    "test_main_job.py::test_fifty_pods_leave_nothing_behind",
    "test_main_job.py::test_bulk_data_through_exec_comes_back_unchanged",
    "test_main_job.py::test_bulk_data_through_cp_comes_back_unchanged",
    "test_cli.py::test_exec_is_quick",
)
_FITTING = ("-m", "not tcg and not registry and not soak")
LONG = (
    *SHORT,
    *(f"{_INTEGRATION}/test_{name}.py" for name in _MORE),
    *(f"--deselect={_INTEGRATION}/{test}" for test in _TOO_LONG),
)
CHOICES = {  # by the name that --suites takes
    "short": (*SHORT, *_FITTING),
    "long": (*LONG, *_FITTING),
}
