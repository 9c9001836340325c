"""What each factor of a verification means, why it matters, and what to do when it fails: one table, in plain words.

`step` names are looked up by their longest beginning that stands here (`measurement.mr_td` under `measurement`). What a
TPM or a GPU beside the CPU adds carries its label in front (`tpm.…`, `gpu-0.…`), and means the same.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

__all__ = ["ABOUT", "EXPLANATIONS", "About", "Explanation", "about", "explain"]

About: TypeAlias = Literal["key", "code", "chip", "model"]

_LABEL = re.compile(r"(tpm|gpu-[0-9]+)\.")


@dataclass(frozen=True, slots=True)
class Explanation:
    """`meaning`: what was looked at and why it matters; `remedy`: what to do when it fails."""

    meaning: str
    remedy: str


def explain(step: str) -> Explanation | None:
    """None for a step that nobody wrote a text for."""
    words = _LABEL.sub("", step, count=1).split(".")
    for length in range(len(words), 0, -1):
        if found := EXPLANATIONS.get(".".join(words[:length])):
            return found
    return None


def about(step: str) -> About:
    """What a step is about: the keys that requests are sealed to and their freshness, the code and who started it, the
    hardware, or the model. Of a step that nobody knows: the code."""
    words = _LABEL.sub("", step, count=1).split(".")
    named = {name: one for one, names in ABOUT.items() for name in names}
    return named.get(".".join(words[:2])) or named.get(words[0]) or "code"


ABOUT: Mapping[About, tuple[str, ...]] = MappingProxyType(
    {
        "key": ("nonce", "binding", "keys", "post-quantum", "key-scope", "purpose", "issued", "expires", "lifetime"),
        "code": (
            *("document", "launch", "statement", "insecure", "provenance", "measurement", "owner", "deployment", "app"),
            *("logs", "broker", "config", "trust", "release", "source", "egress", "code"),
        ),
        "chip": (
            *("endorsements", "evidence", "enrol", "gpu", "device", "gpus", "hardware", "simulator", "tcb", "platform"),
            *("custody", "relay", "rollback"),
        ),
        "model": ("models", "names", "weights", "statement.models"),
    }
)

_FETCH = "Have the collateral fetched afresh (`cloister collateral fetch`); it travels with the evidence."
_FORGED = "Send nothing: genuine evidence never fails here."
_OWNER = "Ask the owner, by another way than this server, before you accept the change."
_VENDOR_ROOT = "Send nothing. Only a new version of cloister can know a new root of the vendor."
_HOST = "Ask whoever runs it to start it as the owner meant it; until then send nothing."
_LOG = "Send nothing: the log was cut or changed, or belongs to another start of the machine."

EXPLANATIONS: Mapping[str, Explanation] = MappingProxyType(
    {
        # The document
        "document": Explanation(
            "All the evidence that this platform needs came along, and nothing that nobody would judge.",
            "The server left something out, or is of another version. Ask whoever runs it.",
        ),
        "endorsements": Explanation(
            "The vendor's certificates and lists came with the evidence, so that it can be judged without asking anybody.",
            _FETCH,
        ),
        "nonce": Explanation(
            "The evidence was made for a random number that this program has just chosen. Old evidence cannot know it.",
            "Ask the enclave itself. A document without a nonce is for looking at only.",
        ),
        "binding": Explanation(
            "The hardware signed your nonce together with the server's statement and keys: nobody in between put in others.",
            "Send nothing: this is replayed evidence, or somebody changed the statement on its way.",
        ),
        # The hardware
        "evidence": Explanation(
            "A rule of the hardware vendor's for genuine evidence of this platform.",
            "Send nothing until you know why.",
        ),
        "evidence.root": Explanation(
            "The chain of certificates ends in the vendor's own root, which is built into this program. Anybody can make"
            " a chain that ends somewhere else.",
            _VENDOR_ROOT,
        ),
        "evidence.chain": Explanation(
            "Each certificate is signed by the one above it, and all are valid today: the chip's key is the vendor's word.",
            "If only a date is wrong, check both clocks and have the collateral fetched afresh. Else send nothing.",
        ),
        "evidence.chip-certificate": Explanation("The simulated chip's certificate is signed by its root.", _FORGED),
        "evidence.signature": Explanation(
            "The chip itself signed this report: not one bit of it was changed.",
            _FORGED,
        ),
        "evidence.signing-key": Explanation(
            "The report says which key signed it, and the certificate is of that kind.", _FORGED
        ),
        "evidence.algorithm": Explanation("It is signed the way the vendor signs, which is strong.", _FORGED),
        "evidence.crl": Explanation(
            "The vendor's list of withdrawn keys is there, is current, and names none of those used here. Without it a"
            " stolen key would go on being believed.",
            _FETCH + " If a key is on the list: send nothing.",
        ),
        "evidence.revoked": Explanation(
            "Nothing used here was withdrawn by the vendor: a withdrawn key may be in an attacker's hands.",
            "Send nothing. No policy can allow this.",
        ),
        "evidence.expired": Explanation(
            "Certificates and the vendor's ratings are all valid today: outdated ones may hide what was found since.",
            _FETCH + " Check this machine's clock too.",
        ),
        "evidence.collateral": Explanation(
            "The vendor's ratings are signed by the vendor, are about this very kind of machine, and are current.",
            _FETCH,
        ),
        "evidence.agreement": Explanation(
            "A second, independent verifier judged the same evidence, and says the same.",
            "Send nothing, and please report it with the document (--save).",
        ),
        "evidence.quote": Explanation("The report is what its length and its version say, and no more.", _FORGED),
        "evidence.trailing": Explanation("Nothing unsigned hangs behind the report.", _FORGED),
        "evidence.qe": Explanation(
            "The report was signed by Intel's own quoting enclave, of a version that Intel lists.",
            _FORGED,
        ),
        "evidence.debug": Explanation(
            "Debug mode is off. With it on, the operator can read all memory, your prompts among it.",
            "Send nothing. Somebody started it to look inside; the owner has to start it without debugging.",
        ),
        "evidence.attributes": Explanation(
            "Its attributes are those of an enclave in production: no debugging, no keys for special purposes.",
            _HOST,
        ),
        "evidence.xfrm": Explanation("The processor features that it may use are known ones.", _HOST),
        "evidence.xfam": Explanation("The processor features that it may use are known ones.", _HOST),
        "evidence.sept-ve": Explanation(
            "The host cannot confuse the guest by taking memory pages away while it looks at them.",
            _HOST,
        ),
        "evidence.seam": Explanation(
            "The TDX module, which keeps the guest apart from the host, is Intel's and one that Intel lists.",
            _HOST,
        ),
        "evidence.service-td": Explanation(
            "No other virtual machine (to migrate it, say) has a right to look into this one.",
            _HOST,
        ),
        "evidence.migration": Explanation(
            "No migration agent may move this virtual machine: one that nobody judged could read it.",
            _HOST,
        ),
        "evidence.guest-policy": Explanation(
            "The rules that the guest was started under are ones that AMD defines.", _HOST
        ),
        "evidence.vmpl": Explanation(
            "The report was asked for by the most privileged level of the guest: no lower one speaks for it.",
            _HOST,
        ),
        "evidence.platform-info": Explanation("How the machine is set up: memory encryption, hyper-threading.", _HOST),
        "evidence.mitigations": Explanation(
            "Which weaknesses of the chip were mitigated when the guest was started.", _HOST
        ),
        "evidence.reserved": Explanation(
            "Where the report has nothing, there is nothing: no room for hidden changes.", _FORGED
        ),
        "evidence.product": Explanation("Report and certificate are of the same kind of processor.", _FORGED),
        "evidence.chip-id": Explanation(
            "The certificate belongs to this very chip, not to another one.",
            _FETCH + " If it fails again: send nothing.",
        ),
        "evidence.tcb": Explanation(
            "The certificate was issued for the firmware that this chip reports, so the chip cannot claim newer firmware.",
            _FETCH + " If it fails again: send nothing.",
        ),
        "evidence.tcb-order": Explanation(
            "The versions of firmware in the report fit each other: none is older than what the machine committed to.",
            _HOST,
        ),
        "evidence.author-key": Explanation(
            "If an author's key was used to start the guest, its digest is stated.", _HOST
        ),
        "evidence.measurement": Explanation(
            "The digest over all measured parts is really that of those parts.", _FORGED
        ),
        "evidence.nonce": Explanation(
            "The report itself carries the expected number: it was made for this very question.",
            "Send nothing: the report is replayed, or belongs to another machine.",
        ),
        "evidence.architecture": Explanation(
            "The GPU is of a kind that this program can judge.", "Use a newer version of cloister."
        ),
        "evidence.fwid": Explanation("The GPU's firmware is the one that its certificate was issued for.", _FORGED),
        "evidence.ocsp": Explanation(
            "Whether the vendor has withdrawn a certificate since can only be asked online, and was not.",
            "Nothing to do: it is said, not judged.",
        ),
        "evidence.runtime": Explanation(
            "The hardware vouches for the virtual machine's own data, its TPM's key among them.",
            "Send nothing: these data are another virtual machine's, or were changed.",
        ),
        "evidence.vm-configuration": Explanation("What the host configured for this machine. For display.", _HOST),
        "evidence.ak": Explanation(
            "The key that signed for the TPM is one that hardware, a provider or your policy vouches for.",
            "Enrol the TPM, and pin its key in the policy; or ask the provider for its certificate.",
        ),
        "evidence.ak-attributes": Explanation("The TPM's key can sign nothing but what the TPM itself says.", _FORGED),
        "evidence.ak-name": Explanation("The quote names the very key that was checked.", _FORGED),
        "evidence.ek": Explanation("The TPM is the one whose certificate was shown.", _FORGED),
        "evidence.ek-attributes": Explanation(
            "The TPM's own key can only be used to prove that it is this TPM.", _FORGED
        ),
        "evidence.magic": Explanation("The TPM made this itself: nobody handed it something else to sign.", _FORGED),
        "evidence.extra-data": Explanation(
            "The TPM's quote was made for this very evidence.",
            "Send nothing: it is replayed, or another machine's.",
        ),
        "evidence.pcr-bank": Explanation("The TPM's registers are SHA-256 ones, which nobody can collide.", _HOST),
        "evidence.pcr-selection": Explanation("The TPM signed exactly the registers that came along.", _FORGED),
        "evidence.pcr-digest": Explanation("The registers that came along are those that the TPM signed.", _FORGED),
        "evidence.eventlog": Explanation(
            "Replaying the boot log gives the signed registers: the log tells what really was started.",
            _LOG,
        ),
        "evidence.hardware": Explanation(
            "A virtual TPM is software of the provider's: it proves the provider's word and no more.",
            "Prefer a confidential virtual machine.",
        ),
        "evidence.provider": Explanation(
            "A virtual TPM alone protects nothing from whoever runs the machine. It counts only if your policy names it.",
            'If the provider may read everything: platforms = ["vtpm"] in the policy. Else use a confidential VM.',
        ),
        "enrol": Explanation(
            "The TPM opened a secret that only it can open: its two keys live in the same TPM.",
            "Enrol again, at the machine itself.",
        ),
        "gpu": Explanation("A rule for GPUs that work with the enclave.", "Send nothing until you know why."),
        "gpu.chain": Explanation("The GPU's certificates lead to NVIDIA's root.", _VENDOR_ROOT),
        "gpu.rim": Explanation(
            "The GPU's firmware measures as NVIDIA's reference values say; without them only your own pins can tell.",
            "Have NVIDIA's asked for (`pip install 'cloister[rim]'`), or pin the GPU's measurements in the policy.",
        ),
        "gpu.ocsp": Explanation(
            "Whether NVIDIA has withdrawn the GPU's certificate can only be asked online, and was not.",
            "Nothing to do: it is said, not judged.",
        ),
        "gpu.mode": Explanation(
            "That confidential computing is on is what the measured code in the enclave checks, not the GPU's report.",
            "Nothing to do: it is said, not judged.",
        ),
        "gpu.relay": Explanation(
            "A GPU of another machine could be put in this one's place until processors and GPUs link in hardware (TDISP).",
            "Nothing to do: it is said, not judged.",
        ),
        "device": Explanation(
            "Each GPU was presented once: the same one shown twice would stand in for one that is missing.",
            "Send nothing: somebody counts one GPU twice.",
        ),
        "gpus": Explanation(
            "As many GPUs work with the enclave as your policy says.",
            "Ask the operator what became of the others, or change limits.gpus in the policy.",
        ),
        "hardware": Explanation(
            "This is no hardware: whoever runs the simulator can read everything.",
            "Use it for trying things out only.",
        ),
        "simulator": Explanation(
            "Anybody can simulate hardware, so a simulator is believed on your own machine only.",
            "Send nothing: this one runs on another machine.",
        ),
        # How old the firmware is
        "tcb": Explanation(
            "How current the platform's firmware is. A simulator has none.",
            "Ask the operator to update the firmware.",
        ),
        "tcb.status": Explanation(
            "How the vendor rates this machine's firmware. Old firmware is genuine, and has known weaknesses.",
            "Ask the operator to update. If the weakness does not matter to you, add the status to tcb.tolerate.",
        ),
        "tcb.advisories": Explanation(
            "The vendor's security advisories that are still open on this machine.",
            "Read them. Those that do not matter to you go into tcb.tolerate_advisories.",
        ),
        "tcb.minimum": Explanation(
            "The firmware is at least as new as your policy demands.",
            "Ask the operator to update the firmware, or lower the minimum in the policy.",
        ),
        "tcb.evaluation": Explanation(
            "The vendor's ratings are at least as new as your policy demands: older ones do not know the newest faults.",
            _FETCH,
        ),
        "tcb.level": Explanation(
            "The vendor knows this combination of firmware and has rated it.",
            "Send nothing: firmware below every rating was never fit for use. Ask the operator to update.",
        ),
        # What was started, and what it says
        "launch": Explanation(
            "Owner, deployment, models and configuration were fixed before the start, and the hardware holds their digest.",
            "Send nothing: it was started with something else than it shows you.",
        ),
        "statement": Explanation(
            "What the enclave says of itself agrees with what it was started with and with what was measured.",
            "Send nothing: it contradicts itself.",
        ),
        "purpose": Explanation(
            "The enclave is ready to answer; or, where its owner asks, it waits for the owner and takes nothing from others.",
            "Wait until it was provisioned, or ask its owner.",
        ),
        "issued": Explanation(
            "The statement was not made in the future: your clock and the enclave's agree within two minutes.",
            "Set this machine's clock. If it is right, the enclave's is wrong: ask whoever runs it.",
        ),
        "expires": Explanation(
            "The statement and its keys are still valid. Old keys may have leaked.",
            "Ask the enclave for new evidence. A saved document is valid at its own time only (--at).",
        ),
        "lifetime": Explanation(
            "The keys live two hours at most, so that one that leaks opens little.",
            "Send nothing: the enclave's clock is wrong, or was tampered with.",
        ),
        "insecure": Explanation(
            "Whether a protection is switched off in the enclave.",
            "Ask the owner to switch it on, or name it in dangerously_tolerate_insecure if you can live without it.",
        ),
        "insecure.plaintext": Explanation(
            "Beside the sealed channel the enclave answers programs of its own machine in clear, for benchmarks. What you"
            " send through the channel is sealed as ever.",
            "Ask the owner to start it without --plaintext, unless it is yours and you compare the two.",
        ),
        "insecure.ehbp": Explanation(
            "It also speaks EHBP, which seals bodies only: whoever is on the way reads and changes paths and headers, API keys"
            " among them, and can cut an answer unnoticed. What you send through the channel is sealed as ever.",
            "Ask the owner to start it without --ehbp, unless a tool of yours speaks nothing else.",
        ),
        "insecure.tls": Explanation(
            "It also answers tools that speak TLS alone: with nothing padded or post-quantum, and only the certificate that"
            " --save-cert keeps tells it from a stranger. What you send through the channel is sealed as ever.",
            "Ask the owner to start it without --tls, unless a tool of yours speaks nothing else.",
        ),
        "insecure.api-keys-off": Explanation(
            "It answers everybody who reaches it: no API key is asked for.",
            "Ask the owner to start it with --api-keys, unless nobody else can reach it.",
        ),
        "insecure.app-unconfined": Explanation(
            "Its machine gives the app inside no view of its own of files and network: other programs of that machine may see"
            " what it keeps in memory files, and where it connects to is enforced by nothing.",
            "Ask the owner for a machine with namespaces (root in its guest, or user namespaces), unless it is yours.",
        ),
        "insecure.padding-off": Explanation(
            "Requests and answers travel at their true length and rhythm, which tell much of what is said.",
            "Ask the owner to start it with padding, unless it is yours and you measure what padding costs.",
        ),
        "insecure.upstream": Explanation(
            "Another server beside the enclave's code runs the model. Which server and which weights those are is not proved:"
            " what stands for the model's digest is one of its name.",
            "Ask the owner for an enclave whose own engine runs the model, or trust the measured image that holds both.",
        ),
        # What the policy says
        "platform": Explanation(
            "It is one of the kinds of hardware that your policy accepts.",
            "Add it to `platforms` in the policy only if you mean to trust that hardware too.",
        ),
        "custody": Explanation(
            "Which machine it is. Somebody with the machine in hand can probe its memory bus, and no evidence shows that.",
            "Name the machines that you know in limits.platform_ids.",
        ),
        "provenance": Explanation(
            "The measurements are signed by whom your policy names, and are about the release that runs.",
            _OWNER,
        ),
        "measurement": Explanation(
            "The code that runs is the code that your policy names: anything else could send your prompts anywhere.",
            _OWNER + " Then: `cloister policy init --replace`.",
        ),
        "owner": Explanation(
            "The deployment belongs to the owner that you named. Anybody can start the same code for themselves.",
            "Name the owner, in the policy or in the address. If another one answers: send nothing.",
        ),
        "deployment": Explanation(
            "It is the deployment that you named, and not another one of the same owner.",
            "Name the deployment, in the policy or in the address. If another one answers: send nothing.",
        ),
        "app": Explanation(
            "The app inside is the one that your policy names. The same image can be started with another one.",
            "Name the app in the policy (`cloister policy init` writes it). If another one runs: send nothing.",
        ),
        "logs": Explanation(
            "What leaves in its logs: nothing, or what the app itself writes where your policy accepts that. Logs can hold what you asked.",
            _OWNER,
        ),
        "broker": Explanation(
            "Beside its owner a key broker may hand it keys and secrets: the one that your policy names, or none.",
            _OWNER,
        ),
        "owner.signature": Explanation(
            "Who pressed the button is not proved: anybody can write an owner's key into a launch config. What runs is.",
            _OWNER,
        ),
        "relay": Explanation(
            "A TPM beside a confidential VM could be another machine's. Its registers are its provider's word.",
            _OWNER,
        ),
        "config": Explanation(
            "The settings that it runs with are those that your policy names.",
            _OWNER,
        ),
        "models": Explanation("The model that answers is one that your policy names, byte for byte.", _OWNER),
        "trust": Explanation(
            "Your policy was written from a running server, so it proves only that nothing has changed since.",
            "Get the fingerprint from the owner by another way: `cloister policy accept FILE --fingerprint …`.",
        ),
        # The keys
        "keys": Explanation(
            "The keys that your requests are sealed to are well formed, and stand in the signed statement.",
            "Send nothing: there is nothing to seal a request to.",
        ),
        "post-quantum": Explanation(
            "Whether a key that withstands quantum computers is offered: then what is recorded today stays closed tomorrow.",
            "Ask the operator to offer one, or do without require_pq.",
        ),
        # What was seen before
        "release": Explanation(
            "The owner's release is not older than one that you have seen. An old one may have faults mended since.",
            _OWNER,
        ),
        "rollback": Explanation(
            "The vendor's lists and ratings are not older than ones you have seen. Old ones may hide a withdrawn key.",
            _FETCH,
        ),
        # What is never proved
        "source": Explanation(
            "Evidence is about the code that runs, not about which source text it was built from.",
            "Build it yourself and compare, or trust a signer of measurements.",
        ),
        "egress": Explanation(
            "The enclave says where it may connect to. The measured code holds a sealed Python app to that, host by host; no"
            " hardware does yet, and nothing holds the built-in app to it.",
            "Read the code that you pinned.",
        ),
        "names": Explanation(
            "A model's name is the operator's word. Its digest was checked.",
            "Compare the digest with the publisher's.",
        ),
        "weights": Explanation(
            "The digest says which weights run, not who made them nor what they were taught.",
            "Pin the digest of weights from a source that you trust.",
        ),
        "code": Explanation(
            "The owner keeps the app's code sealed, so nobody else can read what it does.",
            "Use it only if you trust its owner.",
        ),
        "key-scope": Explanation(
            "Several replicas share their keys: one that leaks opens the requests of all.",
            "Ask the owner for keys of each replica's own, if that is too much.",
        ),
    }
)
