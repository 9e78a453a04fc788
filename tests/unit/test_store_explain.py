"""What an S3 server or its client says, in one line of a user's."""

import pytest

from tilepipe.errors import StoreError
from tilepipe.store.explain import reason_of
from tilepipe.store.remote import explained_remote

REFUSED = """The operation lacked the necessary privileges to complete for path {keys}: Error \
performing POST http://127.0.0.1:9000/b?delete in 4ms - Server returned non-2xx status code: \
403 Forbidden: <?xml version="1.0" encoding="UTF-8"?>
<Error><Code>AccessDenied</Code><Message>Access
 Denied.</Message><Key>a</Key></Error>

Debug source:
PermissionDenied {{
"""


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (REFUSED.format(keys="a"), "the server says AccessDenied: Access Denied"),
        # Of a thousand keys the end is what counts.
        (REFUSED.format(keys="a," * 1000), "the server says AccessDenied: Access Denied"),
        ('<Error xmlns="x"><RequestId/><Code>SlowDown</Code></Error>', "the server says SlowDown"),
        ("no route\nDebug source:\n…", "no route"),
        ("x" * 400, "x" * 300),
        ("", "ValueError"),
    ],
)
def test_the_servers_own_word(said, reason):
    assert reason_of(ValueError(said)) == reason


def test_no_credentials_are_no_riddle_about_an_address():
    said = "Error performing PUT http://169.254.169.254/latest/api/token in 30s - HTTP error"
    with (
        pytest.raises(StoreError, match=r"cannot read a: there are no credentials: set AWS_ACCESS"),
        explained_remote("s3://b/a.zarr", "read a"),
    ):
        raise ValueError(said)
