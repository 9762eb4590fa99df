"""The object server with diskread's managers, whatever swift.conf says: `use = egg:diskread#object`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from swift.common.storage_policy import EC_POLICY, POLICIES, REPL_POLICY
from swift.obj import server

from .managers import DiskFileManager, ECDiskFileManager

if TYPE_CHECKING:
    from collections.abc import Mapping

MANAGERS = {REPL_POLICY: DiskFileManager, EC_POLICY: ECDiskFileManager}


class ObjectController(server.ObjectController):
    """Swift's object server as it is, but for its managers."""

    def setup(self, conf: Mapping[str, Any]) -> None:
        """See `swift.obj.server.ObjectController.setup`; in addition:

        Raises:
            ValueError: A setting of diskread is wrong.
        """  # noqa: D415
        super().setup(conf)
        managers = self._diskfile_router.policy_to_manager
        for policy in POLICIES:
            manager = MANAGERS[policy.policy_type]
            if not isinstance(managers[int(policy)], manager):
                managers[int(policy)] = manager(conf, self.logger)


def app_factory(global_conf: Mapping[str, Any], **local_conf: Any) -> ObjectController:
    """What paste.deploy calls.

    Args:
        global_conf: The section [DEFAULT].
        local_conf: The section of the app.
    """
    return ObjectController({**global_conf, **local_conf})
