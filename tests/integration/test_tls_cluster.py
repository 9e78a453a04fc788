"""A cluster that talks TLS alone: generated certificates, Dask's own settings, our command."""

import datetime
import ipaddress
import json
import time

import pytest

x509 = pytest.importorskip("cryptography.x509")

from cryptography.hazmat.primitives import hashes, serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402


def write_certificates(folder, name):
    """Write a private authority and a key it signed; return Dask's settings for them."""
    now = datetime.datetime.now(datetime.UTC)

    def build(common, key, issuer, signer, *, authority):
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common)])
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer or subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName(
                    [
                        x509.DNSName("localhost"),
                        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
                    ]
                ),
                critical=False,
            )
        )
        return builder.sign(signer, hashes.SHA256())

    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority = build(f"{name} authority", authority_key, None, authority_key, authority=True)
    own = build(name, key, authority.subject, authority_key, authority=False)
    ca, cert = folder / f"{name}-ca.pem", folder / f"{name}.pem"
    ca.write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    cert.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + own.public_bytes(serialization.Encoding.PEM)
    )
    prefix = "DASK_DISTRIBUTED__COMM__"
    roles = {
        f"{prefix}TLS__{role}__{part}": str(cert)
        for role in ("CLIENT", "SCHEDULER", "WORKER")
        for part in ("CERT", "KEY")
    }
    return {f"{prefix}REQUIRE_ENCRYPTION": "true", f"{prefix}TLS__CA_FILE": str(ca), **roles}


@pytest.fixture
def cluster(zygote, tmp_path):
    """A tls:// scheduler and a worker; yields its address and the client's environment."""
    env = write_certificates(tmp_path, "ours")
    file = tmp_path / "scheduler.json"
    host = ["--host", "tls://127.0.0.1"]
    processes = [
        zygote.start(
            "scheduler", *host, "--port", 0, "--dashboard-address", "127.0.0.1:0",
            "--scheduler-file", file, env=env, cwd=tmp_path,
        )
    ]  # fmt: skip
    end_s = time.monotonic() + 100
    while not file.exists() or not file.read_text().rstrip().endswith("}"):
        assert processes[0].poll() is None, processes[0].text()
        assert time.monotonic() < end_s, processes[0].text()
        time.sleep(0.02)
    address = json.loads(file.read_text())["address"]
    processes.append(
        zygote.start(
            "worker", address, *host, "--no-nanny", "--nthreads", 2, "--no-dashboard",
            "--memory-limit", 0, "--local-directory", tmp_path / "space", env=env, cwd=tmp_path,
        )
    )  # fmt: skip
    yield address, env
    for process in processes:
        process.kill()


def test_a_run_over_tls(cluster, zygote, slide, flags, reference, equal, tmp_path):
    address, env = cluster
    assert address.startswith("tls://")
    store = tmp_path / "out.zarr"
    zygote.run("run", slide, "-o", store, *flags, "--scheduler", address, env=env)
    equal(store, reference)


def test_strangers_are_not_let_in(cluster, zygote, slide, flags, tmp_path):
    """Without certificates, with those of another authority, or in plain text."""
    address, _ = cluster
    store = tmp_path / "out.zarr"
    foreign = write_certificates(tmp_path, "foreign")
    plain = address.replace("tls://", "tcp://")
    for where, env in ((address, {}), (address, foreign), (plain, {})):
        text = zygote.run(
            "run", slide, "-o", store, *flags, "--scheduler", where,
            env={**env, "TILEPIPE_SCHEDULER_TIMEOUT_S": 2}, code=1,
        )  # fmt: skip
        assert "no Dask scheduler answers" in text
        assert "Traceback" not in text
