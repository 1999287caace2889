"""Every token that must be refused: RFC 8725 (JSON Web Token Best Current Practices), one row a case.

| RFC 8725                                             | rows beginning with                                          |
|------------------------------------------------------|--------------------------------------------------------------|
| 2.1, 3.1 the algorithm is verified                   | `alg`                                                        |
| 2.2, 3.5 weak keys                                   | `weak`                                                       |
| 3.2, 3.3, 3.4 algorithms, signatures and inputs      | `sig`, `weak`                                                |
| 2.3, 2.4, 2.5, 3.6 encryption, nesting, compression  | `jwe`                                                        |
| 2.6, 3.7 one encoding, UTF-8                         | `form`                                                       |
| 2.7, 3.9 substitution: audience                      | `aud`                                                        |
| 3.8 issuer and subject                               | `iss`; the tenant's claim is the subject here: `tenant`      |
| 2.9, 3.10 claims that would be acted on              | `kid`, `header`: the attacker's server is never asked        |
| 2.8, 3.11, 3.12 one kind of token is not another     | `typ`                                                        |
| RFC 7519 4.1, RFC 7515 4.1.11: times, scopes, crit   | `time`, `scope`, `header`                                    |
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jwt
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, utils
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.gateway_stack import AUDIENCE, ISSUER, Issuer, SigningKey, new_key, segment, sign

P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
DIGEST_INFO_SHA256 = bytes.fromhex("3031300d060960864801650304020105000420")  # RFC 8017, 9.2, note 1


class Case(NamedTuple):
    name: str
    token: str
    reason: str


class WeakKeys:
    """Keys nobody should publish; `published` goes into `Issuer.extra`."""

    def __init__(self) -> None:
        self.small = new_key("RS256", "weak-1024", bits=1_024)
        self.host = new_key("RS256", "weak-e1")
        self.p384 = SigningKey("weak-p384", "ES384", ec.generate_private_key(ec.SECP384R1()))
        self.koblitz = SigningKey("weak-k1", "ES256K", ec.generate_private_key(ec.SECP256K1()))
        self.published: list[Any] = [
            self.small.jwk(),
            self.host.jwk() | {"e": "AQ"},
            self.host.jwk() | {"e": "BA", "kid": "weak-e4"},
            self.p384.jwk(),
            self.p384.jwk() | {"crv": "P-256", "kid": "weak-mislabelled"},
            self.koblitz.jwk(),
            {"kty": "oct", "k": "c2VjcmV0", "kid": "weak-oct"},
            {"kty": "oct", "k": "c2VjcmV0", "kid": "weak-oct-es", "alg": "ES256"},
        ]


def b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def refused(issuer: Issuer, attacker: Issuer, weak: WeakKeys, tenant: str) -> list[Case]:
    """`attacker` runs a key set of its own; no case may make anybody fetch it."""
    forge = _Forge(issuer, attacker, weak, tenant)
    parts = [
        forge.algorithms(),
        forge.signatures(),
        forge.weak_keys(),
        forge.headers(),
        forge.types(),
        forge.forms(),
        forge.claims(),
    ]
    return [case for part in parts for case in part]


class _Forge:
    def __init__(self, issuer: Issuer, attacker: Issuer, weak: WeakKeys, tenant: str) -> None:
        self.issuer, self.attacker, self.weak = issuer, attacker, weak
        self.es, self.rs, self.ed = issuer.keys[:3]
        self.good = issuer.claims(tenant)
        self.token = sign(self.es, self.good)
        self.parts = self.token.split(".")

    def unsigned(self, **header: Any) -> str:
        return segment(json.dumps({"typ": "JWT", "kid": self.es.kid} | header)) + "." + segment(json.dumps(self.good))

    def with_signature(self, raw: bytes, key: SigningKey | None = None) -> str:
        key = key or self.es
        return self.unsigned(alg=key.algorithm, kid=key.kid) + "." + b64(raw)

    def raw(self, header: str | bytes, payload: str | bytes) -> str:
        """Signed by the good key, whatever it says."""
        texts = [t if isinstance(t, bytes) else t.encode() for t in (header, payload)]
        signed = ".".join(b64(t) for t in texts)
        return signed + "." + b64(jwt.get_algorithm_by_name("ES256").sign(signed.encode(), self.es.private))

    def algorithms(self) -> Iterator[Case]:
        for none in ("none", "None", "NONE", "nOnE", ""):
            yield Case(f"alg {none!r}, empty signature", self.unsigned(alg=none) + ".", "algorithm")
            yield Case(f"alg {none!r}, a signature", self.unsigned(alg=none) + "." + self.parts[2], "algorithm")
        public = self.rs.private.public_key()
        secrets = {
            "pem": public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
            "der": public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
            "jwk": json.dumps(self.rs.jwk()).encode(),
            "n": base64.urlsafe_b64decode(self.rs.jwk()["n"] + "=="),
            "empty": b"",
        }
        for name, secret in secrets.items():
            for alg, reason in (("HS256", "algorithm"), ("RS256", "signature")):
                head = self.unsigned(alg=alg, kid=self.rs.kid)
                mac = hmac.digest(secret, head.encode(), hashlib.sha256)
                yield Case(f"alg {alg}, HMAC with the public key as {name}", f"{head}.{b64(mac)}", reason)
        for alg in ("RS256", "EdDSA", "ES384", "ES256K", "PS256", "es256", " ES256", "Ed25519"):
            yield Case(f"alg {alg!r} with an ES256 key", sign(self.es, self.good, {"alg": alg}), "algorithm")
        for name, value in {"missing": ..., "null": None, "list": ["ES256"], "number": 1, "object": {}}.items():
            yield Case(f"alg {name}", sign(self.es, self.good, {"alg": value}), "algorithm")
        yield Case("alg of another key", sign(self.es, self.good, {"kid": self.rs.kid}), "algorithm")
        yield Case("alg RS512 with an RS256 key", sign(self.rs, self.good, {"alg": "RS512"}), "algorithm")
        yield Case("alg under another name", self.raw('{"ALG":"ES256"}', json.dumps(self.good)), "algorithm")

    def signatures(self) -> Iterator[Case]:
        raw = jwt.utils.base64url_decode(self.parts[2])
        r, s = raw[:32], raw[32:]
        zero, order = bytes(32), P256_ORDER.to_bytes(32, "big")
        der = utils.encode_dss_signature(int.from_bytes(r, "big"), int.from_bytes(s, "big"))
        wrong = {
            "r and s 0": zero + zero,
            "r 0": zero + s,
            "s 0": r + zero,
            "r the order": order + s,
            "r and s the order": order + order,
            "r and s swapped": s + r,
            "DER": der,
            "one byte short": raw[:-1],
            "one byte more": raw + b"\0",
            "a leading zero": b"\0" + raw,
            "twice": raw + raw,
            "one byte": b"\0",
            "8 kB": bytes(4_000),
        }
        for name, signature in wrong.items():
            yield Case(f"sig ES256: {name}", self.with_signature(signature), "signature")
        for key in (self.rs, self.ed):
            for name, signature in {"zeros": bytes(64), "256 zeros": bytes(256), "one": b"\0" * 255 + b"\1"}.items():
                yield Case(f"sig {key.algorithm}: {name}", self.with_signature(signature, key), "signature")
        head = self.unsigned(alg="RS256", kid=self.rs.kid)
        pss = self.rs.private.sign(head.encode(), padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256())
        yield Case("sig RS256: made as PSS", f"{head}.{b64(pss)}", "signature")
        sha512 = self.rs.private.sign(head.encode(), padding.PKCS1v15(), hashes.SHA512())
        yield Case("sig RS256: made with SHA-512", f"{head}.{b64(sha512)}", "signature")
        other = self.issuer.claims("somebody-else")
        yield Case(
            "sig of another payload", ".".join((self.parts[0], segment(json.dumps(other)), self.parts[2])), "signature"
        )
        yield Case(
            "sig of another header",
            ".".join((segment(json.dumps({"alg": "ES256", "kid": self.es.kid})), *self.parts[1:])),
            "signature",
        )
        for key in (self.es, self.rs, self.ed):
            stolen = new_key(key.algorithm, key.kid)
            yield Case(f"sig of another {key.algorithm} key", sign(stolen, self.good), "signature")

    def weak_keys(self) -> Iterator[Case]:
        weak = self.weak
        yield Case("weak RSA 1024", sign(weak.small, self.good), "unknown_kid")
        for kid in ("weak-e1", "weak-e4"):
            head = self.unsigned(alg="RS256", kid=kid)
            digest = DIGEST_INFO_SHA256 + hashlib.sha256(head.encode()).digest()
            forged = b"\0\1" + b"\xff" * (256 - 3 - len(digest)) + b"\0" + digest  # m^1 mod n = m
            yield Case(f"weak RSA exponent: {kid}", f"{head}.{b64(forged)}", "unknown_kid")
        yield Case("weak P-384 as ES384", sign(weak.p384, self.good), "algorithm")
        for key, kid in ((weak.p384, "weak-p384"), (weak.p384, "weak-mislabelled"), (weak.koblitz, "weak-k1")):
            yield Case(f"weak {kid} as ES256", sign(key, self.good, {"alg": "ES256", "kid": kid}), "unknown_kid")
        for kid in ("weak-oct", "weak-oct-es"):
            for alg, reason in (("HS256", "algorithm"), ("ES256", "unknown_kid")):
                head = self.unsigned(alg=alg, kid=kid)
                mac = hmac.digest(b"secret", head.encode(), hashlib.sha256)
                yield Case(f"weak {kid} as {alg}", f"{head}.{b64(mac)}", reason)

    def headers(self) -> Iterator[Case]:
        theirs = self.attacker.keys[0]
        pointers = {
            "jku": self.attacker.url,
            "x5u": self.attacker.url,
            "jwk": theirs.jwk(),
            "x5c": [base64.b64encode(b"a certificate").decode()],
            "x5t": b64(hashlib.sha1(b"a certificate").digest()),
            "iss": self.attacker.url,
        }
        for name, value in pointers.items():
            yield Case(f"header {name} of the attacker", sign(theirs, self.good, {name: value}), "unknown_kid")
            claimed = {name: value, "kid": self.es.kid}
            yield Case(f"header {name} of the attacker, our kid", sign(theirs, self.good, claimed), "signature")
        yield Case(
            "header jku and iss of the attacker",
            sign(theirs, self.good | {"iss": self.attacker.url}, {"jku": self.attacker.url}),
            "unknown_kid",
        )
        for name, value in {
            "crit of something known": {"crit": ["exp"], "exp": 1},
            "crit of something unknown": {"crit": ["http://attacker.test/x"], "http://attacker.test/x": True},
            "crit empty": {"crit": []},
            "crit null": {"crit": None},
            "b64 false": {"b64": False, "crit": ["b64"]},
            "b64 true": {"b64": True},
        }.items():
            yield Case(f"header {name}", sign(self.es, self.good, value), "malformed")
        for kid in (
            "nobody",
            "../../../../etc/passwd",
            "/dev/null",
            "' OR '1'='1",
            "*)(uid=*))(|(uid=*",
            "|/bin/true",
            "\0",
            "👻",
            str(self.es.kid).upper(),
            self.attacker.url,
            "k" * 256,
        ):
            yield Case(f"kid {kid[:40]!r}", sign(self.es, self.good, {"kid": kid}), "unknown_kid")
        yield Case("kid missing, several keys", sign(self.es, self.good, {"kid": ...}), "unknown_kid")
        for value in ("", "k" * 257, None, 1, ["a"], {"a": 1}, True):
            yield Case(
                f"kid {str(value)[:20]!r} of a wrong kind", sign(self.es, self.good, {"kid": value}), "malformed"
            )

    def types(self) -> Iterator[Case]:
        for typ in (
            "secevent+jwt",
            "logout+jwt",
            "dpop+jwt",
            "id_token",
            "entity-statement+jwt",
            "JOSE",
            "JWE",
            "",
            " JWT",
        ):
            yield Case(f"typ {typ!r}", sign(self.es, self.good, {"typ": typ}), "malformed")
        for value in (None, 1, ["JWT"], {}):
            yield Case(f"typ {value!r}", sign(self.es, self.good, {"typ": value}), "malformed")
        identity = self.good | {"aud": "a-client", "nonce": "n", "at_hash": "h"}
        yield Case("typ JWT, but an ID token", sign(self.es, identity), "audience")
        yield Case("jwe of five parts", f"{self.parts[0]}.e.e.{self.parts[1]}.{self.parts[2]}", "malformed")
        yield Case("jwe alg dir", segment('{"alg":"dir","enc":"A256GCM"}') + "..AAAA.AAAA.AAAA", "malformed")
        yield Case("jwe enc on a signed token", sign(self.es, self.good, {"enc": "A256GCM"}), "malformed")
        yield Case(
            "jwe nested: cty",
            self.raw(json.dumps({"alg": "ES256", "kid": self.es.kid, "cty": "JWT"}), self.token),
            "malformed",
        )
        yield Case(
            "jwe nested: no cty", self.raw(json.dumps({"alg": "ES256", "kid": self.es.kid}), self.token), "malformed"
        )
        yield Case("jwe cty on plain claims", sign(self.es, self.good, {"cty": "jwt"}), "malformed")
        packed = zlib.compress(json.dumps(self.good).encode())
        for header in ({"zip": "DEF"}, {}):
            yield Case(
                f"jwe compressed {header}",
                self.raw(json.dumps({"alg": "ES256", "kid": self.es.kid} | header), packed),
                "malformed",
            )
        yield Case("jwe zip on plain claims", sign(self.es, self.good, {"zip": "DEF"}), "malformed")

    def forms(self) -> Iterator[Case]:
        head, body, signature = self.parts
        last = ALPHABET.index(signature[-1])  # 64 bytes are 86 characters: four bits of the last are unused
        respelt = signature[:-1] + ALPHABET[last | 1 if last | 1 != last else last ^ 3]
        assert respelt != signature and base64.urlsafe_b64decode(respelt + "==") == base64.urlsafe_b64decode(
            signature + "=="
        )
        flattened = json.dumps({"protected": head, "payload": body, "signature": signature})
        for name, token in {
            "one part": "x",
            "two parts": f"{head}.{body}",
            "four parts": f"{self.token}.",
            "only dots": "..",
            "no signature": f"{head}.{body}.",
            "no header": f".{body}.{signature}",
            "padding of the header": f"{head}=.{body}.{signature}",
            "padding of the signature": f"{self.token}==",
            "a space after the header": f"{head} .{body}.{signature}",
            "a comma": f"{self.token},{self.token}",
            "quoted": f'"{self.token}"',
            "a newline": f"{head}\n.{body}.{signature}",
            "a newline inside": f"{head[:8]}\n{head[8:]}.{body}.{signature}",
            "another spelling of the signature": f"{head}.{body}.{respelt}",
            "the other alphabet": f"{head}.{body}.{signature[:-4]}+/+/",
            "one character too few": f"{head}.{body}.{signature[:-1]}",
            "percent-encoded": self.token.replace(".", "%2E"),
            "JSON serialization": flattened,
            "header a list": f"{segment('[]')}.{body}.{signature}",
            "header not JSON": f"{segment('{')}.{body}.{signature}",
            "header deep": f"{segment('[' * 5_000)}.{body}.{signature}",
        }.items():
            yield Case(f"form: {name}", token, "malformed")
        for name, payload in {"none": "", "a space before": f" {body}", "padding": f"{body}=", "[]": "W10"}.items():
            yield Case(f"form: payload, {name}", f"{head}.{payload}.{signature}", "signature")  # is said first
        yield Case("form: too large", self.token + "A" * 8_192, "too_large")
        yield Case("form: too large, signed", sign(self.es, self.good | {"pad": "x" * 8_000}), "too_large")
        plain = json.dumps({"alg": "ES256", "kid": self.es.kid})
        claims = json.dumps(self.good)
        repeated = {
            "alg": (plain[:-1] + ',"alg":"none"}', claims),
            "kid": ('{"kid":"nobody",' + plain[1:], claims),
            "tenant": (plain, claims[:-1] + ',"tenant_id":"somebody-else"}'),
            "exp": (plain, '{"exp":9999999999,' + claims[1:]),
            "an escaped name": (plain, claims[:-1] + ',"\\u0074enant_id":"somebody-else"}'),
            "a name deep down": (plain, claims[:-1] + ',"act":{"sub":"a","sub":"b"}}'),
        }
        for name, (header, payload) in repeated.items():
            yield Case(f"form: {name} twice", self.raw(header, payload), "malformed")
        for name, payload in {
            "a list": "[]",
            "a string": '"claims"',
            "a number": "1",
            "null": "null",
            "trailing text": claims + "x",
            "a comment": claims[:-1] + "/* */}",
            "single quotes": claims.replace('"', "'"),
            "NaN": claims[:-1] + ',"exp_":NaN}',
            "Infinity": claims[:-1] + ',"exp_":Infinity}',
            "deep": '{"a":' + "[" * 2_600 + "]" * 2_600 + "}",
            "a lone surrogate": claims[:-1] + ',"a":"\\ud800"}',
        }.items():
            yield Case(f"form: payload {name}", self.raw(plain, payload), "malformed")
        for name, raw in {
            "not UTF-8": claims.encode()[:-1] + b',"a":"\xff"}',
            "Latin-1": (claims[:-1] + ',"a":"é"}').encode("latin-1"),
            "UTF-16": claims.encode("utf-16"),
            "a byte order mark": b"\xef\xbb\xbf" + claims.encode(),
            "a zero byte": claims.encode() + b"\0",
            "overlong": claims.encode()[:-1] + b',"a":"\xc0\xaf"}',
        }.items():
            yield Case(f"form: payload {name}", self.raw(plain, raw), "malformed")

    def claims(self) -> Iterator[Case]:
        soon = time.time() + 900
        wrong: list[tuple[str, str, list[Any]]] = [
            ("exp", "claims", [..., "9999999999", "", True, None, 10**400, -(10**400), 1 << 53, [9999999999], {}]),
            ("exp", "expired", [1, 0, -1, -1e9, 1.5, time.time() - 31]),
            ("nbf", "not_yet_valid", [soon, int(soon), 4_000_000_000]),
            ("iat", "not_yet_valid", [soon, int(soon), 4_000_000_000]),
            ("nbf", "claims", ["0", None, True, [], {}, 10**400]),
            ("iat", "claims", ["0", None, False, [], {}, 10**400]),
            ("iss", "issuer", [..., None, "", 1, [ISSUER], {}, ISSUER + "/", ISSUER.upper(), " " + ISSUER]),
            ("iss", "issuer", [self.attacker.url, ISSUER + ".attacker.test", "http://issuer.test", ISSUER + "\0"]),
            ("aud", "audience", [..., None, "", 1, {}, {AUDIENCE: 1}, [], [[AUDIENCE]], [AUDIENCE, 1]]),
            ("aud", "audience", ["other", ["other"], AUDIENCE.upper(), AUDIENCE + "2", AUDIENCE + " other", "*"]),
            ("tenant_id", "claims", [..., None, "", 1, True, ["acme"], {"id": "acme"}]),
            ("tenant_id", "claims", UNSAFE_TENANT_IDS),
            ("sub", "claims", [None, 1, True, [], ["a"], {"id": "a"}]),
            ("scope", "claims", [None, 1, True, {}, ["search", 1], ["search", ["admin"]]]),
        ]  # fmt: skip
        group = {"exp": "time", "nbf": "time", "iat": "time", "tenant_id": "tenant"}
        for claim, reason, values in wrong:
            for value in values:
                shown = "missing" if value is ... else f"{value!r:.40} ({len(repr(value))})"
                changed = {k: v for k, v in (self.good | {claim: value}).items() if v is not ...}
                yield Case(f"{group.get(claim, claim)}: {claim} {shown}", sign(self.es, changed), reason)
        for number in ("NaN", "Infinity", "-Infinity", "1e999", "0x7fffffff"):
            text = json.dumps(self.good | {"exp": "_"}).replace('"_"', number)
            yield Case(f"time: exp {number}", sign(self.es, text), "malformed")


UNSAFE_TENANT_IDS = [
    "../b",
    "b/../../x",
    "..",
    ".",
    "/b",
    "b/",
    "b/c",
    "b\\..\\x",
    "%2e%2e%2fb",
    "B",
    "b ",
    " b",
    "b\n",
    "b\0",
    "b\0/../c",
    "-b",
    "_b",
    "b.db",
    "~b",
    "bé",
    "ｂ",
    "b\u200b",
    "b\u2215c",
    "b" * 64,
    "b" * 4_000,
]
