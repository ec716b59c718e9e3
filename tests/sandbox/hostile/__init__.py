"""The hostile programs, by what they go for."""

from sandbox.hostile.cases import PRINTED, TEST, Hostile
from sandbox.hostile.outside import NETWORK, SECRETS, WRITING
from sandbox.hostile.resources import RESOURCES
from sandbox.hostile.system import KERNEL
from sandbox.hostile.verdict import VERDICT

GROUPS = {
    "Resources": RESOURCES,
    "Secrets": SECRETS,
    "Writing": WRITING,
    "Network": NETWORK,
    "Processes and the kernel": KERNEL,
    "The verdict": VERDICT,
}
ALL = [case for group in GROUPS.values() for case in group]

__all__ = ["ALL", "GROUPS", "PRINTED", "TEST", "Hostile"]
