"""What the demo model is taught about cloister itself, as it is today: plain true sentences, written for this corpus.

``PRODUCT`` has the form of ``facts``; ``COMMANDS`` has, per command, what it does and an example of its use.
"""

from __future__ import annotations

PRODUCT = """
a sealed app, sealed apps, app sealing | A sealed app is a program and its model, encrypted into one bundle under keys that stay with its owner. | The keys go only to an enclave that the owner's machine has verified. | The host stores and starts the bundle, but it has no key for it.
a bundle, bundles | A bundle is one file that holds a sealed app: its code and its model, encrypted in sections. | Its manifest tells sizes and digests, but no content. | cloister package makes it.
a manifest, the manifest | The manifest is the head of a bundle. It lists the sizes and digests of what is sealed inside. | It is the same for the same app. | The digest of the app stands in the launch config.
cloister.toml, the app file, the app's file | cloister.toml is the file that describes an app: what it is, what it needs, and what it may do. | Secrets are only named in it; their values stand in secrets.toml or in the environment. | cloister init writes one to start from.
secrets.toml | secrets.toml holds the values of an app's secrets on the owner's machine. It is never packaged. | The secrets travel in the release, sealed to a verified enclave. | cloister.toml only holds their names.
deployment, deploying an app, cloister deploy, a deployment | To deploy means to run an app on a host. cloister deploy seals the app, sends it up, verifies the waiting enclave, and only then hands over the keys. | The host starts the enclave, but it never gets the keys. | At the end it prints an address that names owner and deployment.
a release, the release, releasing keys | A release hands keys, secrets and settings to a waiting enclave that was verified. It is sealed to a single-use key and signed by the owner. | Each release has a number. Clients remember the highest one and refuse lower ones. | Without a release, a sealed app stays closed.
the waiting state, a waiting enclave, waiting | A waiting enclave has started, but has no keys yet. It can do nothing but prove itself. | Its owner verifies it and then releases the keys. | After a restart, a sealed app waits again.
the owner, an owner, app owner | The owner is the person to whom an app belongs. The owner's key signs the releases. | The owner's key is named in the launch config, so it is part of the evidence. | The owner does not have to trust the operator of the host.
the owner key, an owner key | The owner key is an Ed25519 key that stays in the owner's state folder. It signs releases. | If it is lost, nobody can release the app again, and it must be deployed anew. | A policy can pin it as owner_key.
the launch config, launch config | The launch config says how an enclave was started: owner, deployment, app, models and settings. The hardware holds its digest. | A client can pin what stands in it. | It is public and holds no secrets.
the statement, a statement | The statement is what an enclave says of itself: its keys, its models, its launch config, and what is weakened. Evidence binds it to the hardware. | It names everything that is insecure. | Your client reads it only after it has checked the evidence.
a broker, the broker, cloister broker | A broker is a small server of the owner's that releases keys to enclaves that verify. So an app restarts while its owner sleeps. | Its policy says what it may release, and to whom. | Its log is hash-chained and signed, and clients believe it only if their policy names it.
the broker's log, a hash chain, hash-chained logs | The broker's log is a chain of hashes: each entry names the one before it, and all are signed. A change would break the chain. | cloister broker log verify checks it. | It tells which enclave got which release.
the host daemon, cloister host | cloister host is the operator's daemon. It takes sealed bundles, starts enclaves, keeps them running and relays their bytes. | Nobody has to trust it. | It survives a crash and a full disk, and brings its apps back.
a host token, tokens of a host, access tokens | A host token lets its holder use a host. It is shown once, and the host keeps only its hash. | cloister host token add makes one. | Its holder can stop apps, but cannot read them.
the console, the host console | The console is a page of the operator's host. It shows apps, states, logs and the verdict on their evidence. | It is read-only. | cloister host console prints its address, good for one browser.
cloister connect, the verifying proxy | cloister connect verifies an enclave and then offers an OpenAI-compatible API on your own machine. It seals what it forwards. | You only change the base URL of your tool. | It also shows a web chat.
the web chat, web chat | The web chat is a page that the local proxy serves. It shows the answers with the proof beside them. | Conversations are kept in the browser alone, encrypted. | Its panel shows each step of the verification.
the trust panel | The trust panel is the part of the web chat that shows the proof: each step, passed or failed or not proved. | It says what cloister verify says. | A simulated platform has another colour there.
cloister chat, the terminal chat | cloister chat is a chat in the terminal that verifies the enclave first. | What you save there lies encrypted on your machine. | Type /help to see its commands.
cloister verify, verification | cloister verify says whether an enclave is what it claims to be. It checks the evidence against your policy, step by step. | Each step is pass, fail or not proved. | It ends with 0 when the enclave is trusted and with 3 when it is not.
a factor, factors, a verification step | A factor is one step of the verification, with a name and a result: pass, fail, or not proved. | What cannot be checked counts as failed. | cloister verify --explain says what each one means.
not proved | Not proved means that this evidence cannot say anything about the matter. It is listed so that you know. | Who has the machine in hand is never proved by evidence alone. | It is neither a pass nor a failure.
exit codes, the exit codes | Exit codes tell a script how a command ended: 0 good, 1 other, 2 usage, 3 not trusted, 4 malformed, 5 unreachable. | Ctrl+C gives 130. | All commands of cloister use the same ones.
pinning, to pin, pinned | To pin means to write down exactly what you accept, such as a measurement or the digest of a model. | When something pinned changes, the client refuses. | cloister policy init writes a policy that pins what it saw.
collateral | Collateral is what the vendors say about their hardware: certificates, revocation lists and update levels. | cloister collateral fetch keeps it, so that evidence can be judged offline. | Old collateral is refused.
a revocation list, revocation, a CRL | A revocation list names certificates that are no longer good. | A client checks it before it believes evidence. | An old list could hide a new revocation, so its age counts.
the TCB, TCB status, trusted computing base | The TCB is all that you have to trust: the chip, its firmware and the code inside. Its status says whether the updates are in. | UpToDate is the best status. | A policy says which status is good enough.
firmware | Firmware is the software inside a chip or a board. Evidence says how new it is. | Old firmware can have known flaws. | The vendor's lists say which version is up to date.
the forecast, a forecast of expiry | The forecast tells what expires when: certificates, lists and other collateral. So nothing breaks overnight. | cloister verify prints it. | Renew what ends soon.
key rotation, rotating keys | Key rotation means that an enclave makes new keys from time to time and drops the old ones. | A client takes new keys only with fresh evidence. | So a stolen key is useful for a short time only.
a receipt from cloister, signed receipts, cloister receipt | A receipt is a signed proof of which model answered which request. It holds hashes and not your words. | cloister ask --receipt FILE keeps one. | cloister receipt verify checks it offline.
an API key, API keys | An API key lets a program use an enclave. cloister keys new makes one, and only its hash goes to the server. | Each key has a part of the cache of its own. | Send it as a bearer token, inside the sealed request.
the OpenAI API, an OpenAI client, OpenAI compatibility | Any OpenAI client works with cloister through the local proxy. You only change the base URL. | Chat, completions, embeddings, models and responses are there. | The proxy verifies first and then seals each request.
the Anthropic API, an Anthropic client | cloister also speaks Anthropic's messages API, with streaming and tools. | The stock package works through the local proxy. | Tokens can be counted too.
streaming, a stream | Streaming sends an answer piece by piece while it is made. | cloister pads each piece and sends it on a grid of 50 milliseconds, so that timing tells less. | A stream that was cut is noticed.
tool calls, function calling, tools of a model | With tool calls a model asks your program to run a function, and answers with its result. | Your own program runs the function, not the enclave. | I can try it with simple tools.
a JSON schema, structured output, response_format | A JSON schema describes which form an answer must have. cloister makes the model follow it with a grammar. | Ask for it with response_format. | It works with every model, even with me.
a grammar, GBNF | A grammar says which texts are allowed. The engine then writes nothing else. | cloister bounds grammars, so that a hostile one harms nobody. | GBNF is the form in which llama.cpp takes them.
the prompt cache, prefix caching, cached tokens | The prompt cache keeps what was computed for the beginning of a prompt, so that the same beginning is not read twice. | In cloister nobody can use the cache of somebody else. | It is reused only for the same key and the same client secret.
the engine, the inference engine | The engine is the part that runs the model. In cloister it is llama.cpp in a process of its own. | If it crashes, it is started again and other requests go on. | Its library is measured like the rest of the code.
an upstream, upstream servers, vLLM | An upstream is another model server on the same machine, such as vLLM, that cloister can use instead of its own engine. | The statement names it, so that a client can refuse it. | The evidence then does not prove the weights by itself.
the simulator's root, the simulator root, dangerously-trust-simulator | The simulator's root is the key under which simulated evidence is signed. A client trusts it only when told to. | The option is called --dangerously-trust-simulator. | It proves nothing against the owner of the machine.
a measured image, the image, an enclave image | A measured image is a whole system for a virtual machine whose hash is known before it starts. | The evidence shows its measurement. | A policy can pin it.
a group of enclaves, groups of enclaves, several enclaves | A group is several enclaves that belong together. cloister connect can offer several at once, each with its own policy. | Each one is verified by itself. | When two models have one name, the enclave's name stands in front.
a measurement policy, measurements in a policy | A policy lists the measurements that you accept, per platform. Everything else is refused. | Measurements can also come from a signer whom you name. | cloister policy measurements shows them.
a signed policy, signing a policy | A policy can be signed, so that others know who wrote it. | cloister policy sign signs it, and cloister policy check looks at it. | A wrong signature is refused.
lineage, a lineage record | A lineage record says where the weights of a model come from: the source, the quantization and the digests. | Its digest stands in the statement. | It is as true as the person who wrote it.
egress | Egress means connections that an app opens to the outside. A sealed app has none, unless its file declares them. | The launch config names where an enclave may connect to. | Less egress means fewer ways for data to leave.
an expiry, app expiry, cloister expire | An expiry is the time at which an app shall end. The one in cloister.toml holds inside the enclave. | cloister expire sets the host's own clock, which may end it earlier. | After it, the keys are gone.
a rollback, rollback protection | A rollback starts an old release again, perhaps one with a known bug. Clients remember the highest number and refuse lower ones. | Only what this client has seen before can be noticed. | A first contact has no memory.
the adversary, cloister demo attack, attacks of a hostile host | cloister demo attack plays a hostile host against a simulated enclave. Each attack really happens, and a check stops it. | It listens, flips bits, replays, and swaps keys, code and models. | Then it prints which check stopped which attack.
cloister doctor | cloister doctor says which TEE this machine has, and what is missing. | Run it on the machine that shall run the enclave. | It changes nothing.
cloister bench, benchmarks | cloister bench measures speed and overhead on your own machine. | It shows the cost of the encryption too. | Numbers of other machines can differ.
cloister up, make run | cloister up tries it all on one machine: a simulated enclave, a model, the proxy and a chat. | make run sets everything up first and then does that. | In simulation the operator can read everything.
EHBP | EHBP is another way to seal the body of a request. cloister offers it for stock clients when told to. | It hides less than Oblivious HTTP: method, path and headers stay visible. | It is off by default and named in the statement.
plaintext mode, serve --plaintext | Plaintext mode serves the API unsealed on the machine itself, for comparison. The statement names it, and clients refuse it. | It is never for real use. | It listens on loopback only.
a user, the user | A user verifies the enclave, and then talks to it. The user trusts the hardware and the owner's address. | The user does not have to trust the host. | The user's client does the checking.
three parts, the three roles, who takes part | There are three roles: the operator runs the host, the owner seals and deploys the app, and the user verifies and talks. | Nobody has to trust the operator. | They may be three machines, or one.
AEAD, authenticated encryption | AEAD is encryption that also notices changes. A changed byte makes the whole message fail. | Cloister seals with it. | Its long name is authenticated encryption with associated data.
a key exchange, Diffie-Hellman, X25519 | In a key exchange two sides agree on a secret key over an open line. X25519 is one way to do it. | A listener hears both messages and still does not know the key. | It does not tell who is at the other end.
a root of trust, the root key, a vendor root | A root of trust is the key at the end of a chain of certificates. For hardware it is the key of the vendor. | The roots are built into cloister. | If the root is wrong, nothing above it counts.
a MITM, a man in the middle, man in the middle attack | A man in the middle sits between two sides and plays each one to the other. | Attestation binds the keys to the hardware, so foreign keys are refused. | cloister demo attack shows it.
entropy, randomness, random numbers | Randomness is what nobody can predict. Keys and nonces are made of it. | A computer gathers it from its hardware. | Bad randomness makes good encryption weak.
a salt | A salt is a random value that is hashed together with a secret, so that equal secrets look different. | It is not secret itself. | It makes prepared tables useless.
symmetric encryption, AES | Symmetric encryption uses the same key to lock and to unlock. AES is the best known kind. | It is fast, so it carries the data. | The key itself must be agreed on in another way.
asymmetric encryption, public key encryption | Asymmetric encryption uses two keys: a public one to lock, and a private one to unlock. | It is slower, so it mostly carries a fresh symmetric key. | HPKE joins both kinds.
MRENCLAVE | MRENCLAVE is the measurement of an SGX enclave: a hash of its first memory. | When the code changes, it changes too. | A policy can pin it.
PCRs, a PCR | PCRs are registers that can only be extended with hashes, never set. They hold what was measured at the start. | TPMs and Nitro enclaves have them. | A policy can pin their values.
VCEK | VCEK is the key of an AMD chip that signs the reports of SEV-SNP. | Its certificate leads to AMD's root. | It depends on the version of the firmware.
a virtual machine, VMs, a VM | A virtual machine is a computer made of software, on a real one. | TDX and SEV-SNP protect a whole one. | The real machine below it is called the host.
a process | A process is a program that runs. Each has its own memory. | SGX makes enclaves inside a process. | cloister runs its engine in a process of its own.
a server | A server is a computer or a program that answers requests of others. | With cloister the server can be verified before you ask it. | The other side is called the client.
a client | A client is a program that asks a server. The client of cloister verifies first and then seals. | It sends nothing when the check fails. | It runs on your own machine.
an attack | An attack is an attempt to break a protection. Cloister counts the operator of the machine as an attacker. | cloister demo attack plays sixteen of them. | Each is stopped by a check with a name.
"""

COMMANDS = {
    "up": ("tries it all here: a simulated enclave, a model and a chat", "cloister up"),
    "chat": ("lets you talk to a model in an enclave, verified first", "cloister chat URL --policy FILE"),
    "ask": (
        "asks one question, verified first, and prints the answer",
        'cloister ask URL "Who are you?" --policy FILE',
    ),
    "verify": ("says whether an enclave is what it claims to be", "cloister verify URL --policy FILE"),
    "receipt": ("says which model gave an answer, by its receipt", "cloister receipt verify FILE"),
    "policy": ("writes, accepts, signs and checks what you believe", "cloister policy init URL"),
    "collateral": ("fetches and keeps what the vendors of the hardware say", "cloister collateral fetch"),
    "fetch": ("asks one path of an app in an enclave, verified first", "cloister fetch URL /PATH"),
    "connect": (
        "verifies, and then serves an OpenAI-compatible API on your machine",
        "cloister connect URL --policy FILE",
    ),
    "serve": ("runs a model in an enclave on this machine", "cloister serve --platform sim --port 8484"),
    "init": ("writes a small app that works, to start from", "cloister init chat --template llm"),
    "test": ("runs an app and its tests in a simulated enclave here", "cloister test chat"),
    "package": ("seals an app and its model into one file", "cloister package chat"),
    "deploy": ("runs an app on a host, and verifies the enclave before it gets keys", "cloister deploy chat"),
    "list": ("lists the apps on a host", "cloister list"),
    "status": ("shows one app, or the host itself", "cloister status chat"),
    "logs": ("shows what the enclave of an app said of itself", "cloister logs chat"),
    "stop": ("stops an app; its address stays its own", "cloister stop chat"),
    "restart": ("starts an app again and releases its keys anew", "cloister restart chat"),
    "remove": ("removes an app with its bundle and logs", "cloister remove chat --yes"),
    "expire": ("says when an app shall end", "cloister expire chat --in 7d"),
    "broker": ("releases keys to verified enclaves while you sleep", "cloister broker init"),
    "login": ("keeps the token that a host's operator gave you", "cloister login URL"),
    "logout": ("forgets the token of a host", "cloister logout"),
    "host": ("runs the operator's host, with the apps of others in enclaves", "cloister host --port 8700"),
    "doctor": ("says which TEE this machine has", "cloister doctor"),
    "models": ("fetches, describes, quantizes and removes models", "cloister models list"),
    "keys": ("makes and lists API keys", "cloister keys new"),
    "bench": ("measures speed and overhead on this machine", "cloister bench overhead"),
    "demo": ("plays the attacker and shows each attack blocked", "cloister demo attack"),
}

TASKS = (
    ("deploy", "deploy an app, run my app on a host, put my app on somebody else's machine, ship my app"),
    ("init", "start a new app, make an app, create an app, begin an app"),
    ("test", "test my app, try my app before I deploy it, run the tests of an app"),
    ("package", "seal an app, package an app, make a bundle"),
    ("verify", "check an enclave, know that an enclave is real, verify a server"),
    ("receipt", "check a receipt, verify a receipt, prove which model answered"),
    ("policy", "write a policy, make a policy, pin what I saw"),
    ("connect", "use my OpenAI client, use my own tools, use the proxy, open the web chat, use LangChain"),
    ("serve", "start an enclave, run a model, serve a model"),
    ("chat", "chat with a model, open a chat in the terminal"),
    ("ask", "ask one question, ask a question from a script"),
    ("logs", "see the logs of my app, read the log"),
    ("list", "see my apps, list my apps"),
    ("stop", "stop an app, end an app"),
    ("restart", "restart an app, start my app again, release the keys again"),
    ("remove", "remove an app, delete an app"),
    ("expire", "let an app end by itself, set an end for an app"),
    ("broker", "restart apps while I sleep, release keys without my machine, run a broker"),
    ("login", "log in to a host, store a host's token"),
    ("host", "run a host, be an operator, offer my machine to others"),
    ("doctor", "see which TEE I have, check my hardware, find out what this machine can do"),
    ("models", "fetch a model, quantize a model, see which models I have"),
    ("keys", "make an API key, create an API key"),
    ("bench", "measure the speed, see how fast it is, see the overhead"),
    ("demo", "see attacks fail, play the attacker, watch a hostile host"),
    ("collateral", "get the vendor's lists, judge evidence offline"),
    ("up", "try cloister, see everything at once"),
)
