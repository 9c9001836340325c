"""What the demo model is taught: plain true sentences, written for this corpus.

One line per subject: its names | what it is | more | still more. Braces hold alternatives (see ``grammar``).
"""

from __future__ import annotations

import world

PRIVACY = """
attestation, remote attestation | Attestation is a proof, signed by the hardware, of which code runs in an enclave. | Your client checks the proof before it sends any secret. If the code is not the expected one, nothing is sent. | It does not prove that the code has no bugs, or that the answers of a model are true.
an enclave, enclaves, a secure enclave | An enclave is a part of a computer that the hardware keeps apart from everything else. Its memory is encrypted, so that on real hardware the operator of the machine cannot simply read it. | You can check an enclave with attestation before you send it anything. | An enclave does not protect you from bugs in the code that runs inside it.
a TEE, TEEs, a trusted execution environment | A TEE, or trusted execution environment, is a place in a processor where code and data are protected while they are used. An enclave is one kind of TEE. | Examples are Intel SGX, Intel TDX, AMD SEV-SNP and AWS Nitro Enclaves. | You should verify a TEE by attestation, and not just believe in it.
confidential computing | Confidential computing protects data while it is being used, and not only while it is stored or sent. | The work is done inside a TEE, and attestation proves which code does it. | You still trust the maker of the chip and the code inside.
SGX, Intel SGX | Intel SGX is a technology that makes enclaves inside a process. The memory of such an enclave is encrypted by the processor. | A quote from SGX names the measurement of the enclave, called MRENCLAVE. | Old SGX machines had flaws, so a client must also check that the machine is up to date.
TDX, Intel TDX | Intel TDX protects a whole virtual machine. It is made so that the host cannot read its memory. | A TDX quote holds measurements of the firmware and of what was started. | The protected machine is called a trust domain.
SEV-SNP, AMD SEV-SNP, SEV | AMD SEV-SNP protects a whole virtual machine: its memory is encrypted and guarded against changes by the host. | The chip signs a report that holds the measurement of the machine. | The report is signed with a key of the chip, called VCEK.
Nitro, Nitro Enclaves, AWS Nitro Enclaves | AWS Nitro Enclaves are separate virtual machines without disk and without network of their own. | Their attestation document is signed by AWS, so there you trust AWS too. | The measurements of a Nitro enclave are called PCRs.
a TPM, TPM | A TPM is a small chip that measures what a computer started and can sign these measurements. | A TPM alone does not encrypt the memory. | The measurements are kept in registers that are called PCRs.
GPU evidence, GPU attestation, a confidential GPU | GPU evidence is a signed report of a graphics card that works in confidential mode. | It must be bound to the evidence of the CPU, because otherwise another card could answer. | Large models need a GPU, so their privacy depends on this evidence too.
a measurement, measurements | A measurement is a hash of the code that was started. When one byte of the code changes, the measurement changes. | The client compares the measurement with the one it expects. | A measurement says which code runs. It does not say that the code is good.
a quote, quotes | A quote is a statement, signed by the hardware, that holds a measurement and some data of the enclave. | The client checks its signature up to a root key of the maker. | The data in a quote bind the keys of the enclave to it.
a nonce, nonces | A nonce is a random number that is used only once. It proves that an answer is fresh and not an old recording. | The client of cloister sends a new nonce of 32 bytes when it asks for evidence. | Without a nonce, somebody could play back old evidence.
a policy, policies | A policy is a file that says what your client accepts: which platforms, measurements, models and owners. | When the evidence does not fit the policy, the client refuses to send anything. | What a policy does not mention is judged strictly.
a simulated TEE, simulation, simulation mode, the simulator | A simulated TEE is made of software only. It shows how everything works, but the operator can read everything in it. | It is good for tests and for learning. Do not send real secrets to it. | Only real hardware, checked by attestation, can protect you from the operator.
the host, the operator | The host is the computer, and its operator, that runs the enclave. On verified hardware it sees only ciphertext; in simulation it can read everything. | The host still sees when you send something, and about how much. | The host can also switch the enclave off.
ciphertext | Ciphertext is encrypted data. Without the key it looks like random bytes. | Between your client and the enclave, the host sees only ciphertext. | The opposite of ciphertext is plaintext.
plaintext | Plaintext is data that is not encrypted. Anybody who gets it can read it. | An enclave of cloister refuses requests in plaintext. | Encryption turns plaintext into ciphertext.
encryption | Encryption turns readable data into data that can only be read with the right key. | Your messages to an enclave are encrypted for a key that your client verified first. | Encryption alone does not tell you who holds the key. That is why there is attestation.
a receipt, receipts | A receipt is a signed note that says which model answered which request. | It holds hashes and not your words. | You can keep a receipt as a proof for later.
padding | Padding adds empty bytes to messages, so that their size tells less about their content. | Cloister pads requests, answers and each part of a stream. | Padding makes guessing harder, but it does not hide everything.
HPKE | HPKE is a standard way to encrypt a message for the public key of a receiver. | Cloister uses HPKE to seal your requests to the key of the enclave. | Its full name is hybrid public key encryption.
OHTTP, Oblivious HTTP | Oblivious HTTP, or OHTTP, is a standard that carries whole HTTP requests inside encrypted messages. | Cloister uses it in chunks, so that answers can stream and a cut answer is noticed. | The host passes the messages on and sees only ciphertext.
post-quantum cryptography, post-quantum encryption, X-Wing, ML-KEM | Post-quantum cryptography is made to resist quantum computers too. Cloister uses X-Wing, which joins X25519 and ML-KEM. | With X-Wing, both parts must be broken before the message can be read. | It protects recordings of today from the computers of tomorrow.
a quantum computer, quantum computers | A quantum computer computes with quantum states. A large one could break some of the encryption of today. | Cloister uses post-quantum encryption because of that. | Large quantum computers do not exist yet, as far as I know.
a hash, hashes, a digest | A hash is a short fingerprint of data. If the data change, the hash changes too. | Cloister uses hashes to name code and models exactly. | A well-known hash is SHA-256.
a signature, a digital signature | A digital signature proves that somebody who has a certain key signed some data. | Everybody can check it with the public key. | The evidence of an enclave is signed by the hardware.
a public key | A public key is a key that everybody may know. It is used to encrypt for somebody or to check a signature. | The matching private key stays secret. | The keys of an enclave stand in its evidence.
a private key | A private key is a key that must stay secret. It opens what was encrypted for the matching public key. | The private keys of an enclave are made inside it. | If a private key leaks, it must be replaced.
a certificate | A certificate is a signed statement that says to whom a public key belongs. | Certificates form a chain up to a root. | The evidence of hardware is checked with such a chain.
TLS, HTTPS | TLS protects a connection between two computers. It says nothing about which code runs at the other end. | With cloister, the message itself is sealed for the enclave, so that a server in between sees ciphertext. | HTTPS is HTTP over TLS.
a proxy, the local proxy | The local proxy is a small program on your own computer. It verifies the enclave and then seals your requests for it. | Programs that speak the OpenAI API can use it when you change one address. | It listens only on your own machine.
sealing, sealed | Sealed means encrypted so that only the enclave that was verified can open it. | On simulated hardware the operator could still look into that enclave. | Your client seals each request with a fresh key.
a replay, a replay attack | In a replay attack, somebody sends an old message a second time. | Cloister remembers what it has opened and refuses it the second time. | A fresh nonce protects evidence from replays.
a language model, an LLM, a large language model | A language model is a program that predicts the next piece of a text. It has learned that from examples. | It does not look up facts, so it can be wrong. | I am a very small one.
a GGUF file, GGUF | GGUF is a file format for language models. It holds the weights, the tokenizer and the chat template. | Cloister loads models in this format and records their hash. | I am stored in such a file myself.
quantization | Quantization stores the weights of a model with fewer bits. The model gets smaller and faster and loses a little quality. | My own weights are stored with eight bits. | A usual name of that form is q8_0.
a token, tokens | A token is a piece of text, often a word or a part of a word. Language models read and write tokens. | I know 4096 different tokens. | Spaces belong to tokens too.
perplexity | Perplexity measures how surprised a model is by a text. Lower is better. | A perplexity of one would mean no surprise at all. | It can only be compared for the same text and the same tokens.
a context window, the context | The context is the text that a model can look at while it answers. Mine has 4096 tokens. | What does not fit into it is not seen. | I forget everything when the conversation ends.
llama.cpp | llama.cpp is a program that runs language models on ordinary computers. Cloister uses it as its engine. | It runs in a process of its own inside the enclave. | It reads GGUF files.
a threat model, the threat model | A threat model says who may attack, what they can do, and what is protected. | For cloister, the operator of the machine counts as an attacker. | Broken chips and bugs in the code inside are named as limits.
a side channel, side channels | A side channel leaks secrets through time, size or power instead of words. | Padding and steady timing make it harder. | No system removes all side channels.
a prompt | A prompt is the text that you send to a model. | With cloister it is sealed before it leaves your computer. | In simulation the operator could still read it.
"""
WORLD = """
water | Water is made of hydrogen and oxygen. All living things need it. | It freezes at 0 degrees Celsius and boils at 100 degrees.
ice | Ice is frozen water. It is lighter than water, so it floats. | Water turns to ice at 0 degrees Celsius.
the sun | The sun is a star. It gives light and warmth to the Earth. | It is about 150 million kilometres away.
the moon | The moon goes around the Earth. It takes about one month for each round. | It shines because the sun lights it.
the Earth, our planet | The Earth is the planet on which we live. It goes around the sun once a year. | Most of it is covered with water.
a star, stars | A star is a huge ball of hot gas that shines by itself. | The sun is the star that is nearest to us.
a planet, planets | A planet is a large round body that goes around a star. There are eight planets around our sun. | The largest of them is Jupiter.
Mars | Mars is a planet. It is called the red planet because of the rust in its soil. | It is smaller than the Earth.
Jupiter | Jupiter is the largest planet of our solar system. | It is made mostly of gas and has many moons.
gravity | Gravity is the force that pulls things towards each other. It makes apples fall and keeps the moon near the Earth. | The heavier a thing is, the stronger it pulls.
rain | Rain is water that falls from the clouds. | Plants need rain to grow.
snow | Snow is made of small ice crystals that fall from the clouds. | It falls when the air is cold.
a rainbow, rainbows | A rainbow appears when the sun shines through drops of rain. The drops split the light into colours. | Its colours are red, orange, yellow, green, blue, indigo and violet.
wind | Wind is air that moves. | It blows from places of high pressure to places of low pressure.
a cloud, clouds | A cloud is made of many tiny drops of water or ice. | When the drops get heavy, it rains.
thunder, lightning | Lightning is a huge spark of electricity in the sky. Thunder is the sound that it makes. | You see the lightning first, because light is faster than sound.
the ocean, the sea | The ocean is a very large body of salt water. It covers most of the Earth. | The largest ocean is the Pacific.
a river, rivers | A river is water that flows through the land to a lake or to the sea. | Many cities were built beside rivers.
a mountain, mountains | A mountain is a very high piece of land. The highest one on Earth is Mount Everest. | It is colder on the top than below.
a volcano, volcanoes | A volcano is a mountain with an opening from which hot melted rock can come. | The melted rock is called lava.
a desert, deserts | A desert is a place where it hardly ever rains. | The Sahara in Africa is a very large desert.
a forest, forests | A forest is a large place full of trees. | Many animals live in forests.
a tree, trees | A tree is a tall plant with a trunk of wood, branches and leaves. | Trees take carbon dioxide from the air and give oxygen.
a flower, flowers | A flower is the part of a plant that makes seeds. Many flowers have bright colours. | The colours call bees and other insects.
photosynthesis | Photosynthesis is how plants make sugar from light, water and carbon dioxide. | It also gives the oxygen that we breathe.
a cat, cats | Cats are small animals that like to sleep, play and hunt. They eat meat and fish. | A young cat is called a kitten.
a dog, dogs | Dogs are friendly animals. They like to run, to play and to be with people. | A young dog is called a puppy.
a horse, horses | Horses are large strong animals. They eat grass and can run fast. | A young horse is called a foal.
a cow, cows | Cows are large animals that give milk. They eat grass. | A young cow is called a calf.
a sheep | Sheep are animals that give us wool. | A young sheep is called a lamb.
a pig, pigs | Pigs are clever animals. They like to roll in the mud. | A young pig is called a piglet.
a bird, birds | Birds are animals with feathers and wings. Most of them can fly. | All birds lay eggs.
a fish | Fish live in water and breathe with gills. | Most fish have scales and fins.
a bee, bees | Bees are insects that make honey. They also help flowers to make seeds. | Many bees live together in a hive.
an ant, ants | Ants are small insects that live together in large groups. | An ant can carry much more than its own weight.
a butterfly, butterflies | A butterfly is an insect with large coloured wings. | It begins its life as a caterpillar.
an elephant, elephants | Elephants are the largest animals on land. They have long trunks. | They live in groups and eat plants.
a lion, lions | Lions are large wild cats. They live in groups and hunt together. | The male has a mane.
a tiger, tigers | Tigers are the largest cats. They have orange fur with black stripes. | They like to swim.
a bear, bears | Bears are large strong animals with thick fur. | Many bears sleep through the winter.
a whale, whales | Whales are very large animals that live in the sea, but they breathe air. The blue whale is the largest animal of all. | Whales are not fish.
a frog, frogs | Frogs are small animals that live near water. They can jump far. | Young frogs are called tadpoles.
a rabbit, rabbits | Rabbits are small animals with long ears. They eat plants. | They live in holes in the ground.
a fox, foxes | Foxes are clever wild animals with red fur. | They hunt mostly at night.
a spider, spiders | Spiders have eight legs. Many of them make webs to catch insects. | They are not insects.
bread | Bread is made from flour, water, salt and yeast. It is baked in an oven. | The yeast makes it light.
cheese | Cheese is made from milk. | There are many hundred kinds of cheese.
coffee | Coffee is a hot drink made from roasted beans. It makes many people feel awake. | That comes from caffeine.
tea | Tea is a drink made from leaves and hot water. | There is green tea and black tea, and many others.
chocolate | Chocolate is made from cocoa beans and sugar. | Cocoa trees grow in warm countries.
an apple, apples | An apple is a round fruit that grows on a tree. It can be red, green or yellow. | Apples are good in a cake.
a banana, bananas | A banana is a long yellow fruit. It grows in warm countries. | Before it is ripe, it is green.
pizza | Pizza is a flat bread with tomato and cheese, baked in a hot oven. It comes from Italy. | You can put almost anything on it.
rice | Rice is a grain. It is the daily food of many people. | It grows in wet fields.
honey | Honey is a sweet food that bees make from flowers. | It keeps for a very long time.
salt | Salt is a white mineral that we put into food. The sea is full of it. | It is made of sodium and chlorine.
a computer, computers | A computer is a machine that follows instructions very fast. The instructions are called a program. | Inside, it works with zeros and ones.
a program, programs, software | A program is a list of instructions for a computer. | People write programs in programming languages.
Python | Python is a programming language that is easy to read. Cloister is written in it. | A first program is: print("Hello, world!")
Linux | Linux is a free operating system. Many servers use it. | Its mascot is a penguin.
the internet | The internet connects computers all over the world. I have no access to it. | Web pages and mail travel over it.
a robot, robots | A robot is a machine that can do work by itself. | I am not a robot, because I have no body.
artificial intelligence, AI | Artificial intelligence is the art of making programs do things that seem to need thinking. | Language models are one kind of it.
a password, passwords | A password is a secret word that proves who you are. Use a long one, and a different one for each place. | A password manager can remember them for you. Never tell a password to me.
open source | Open source means that everybody may read, use and change the code of a program. | Cloister is open source, under the Apache 2.0 licence.
time zones, a time zone | A time zone is a part of the Earth that uses the same time. | When it is noon in one place, it is night in another.
a year | A year is the time in which the Earth goes once around the sun. It has 365 days, or 366 in a leap year. | It has twelve months.
a week | A week has seven days. | They are Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.
music | Music is the art of putting sounds together. | People make it with their voices and with instruments.
a guitar | A guitar is an instrument that usually has six strings. | You play it with your fingers or with a pick.
a piano | A piano is an instrument with 88 black and white keys. | Each key makes a small hammer hit the strings.
football, soccer | Football is a game in which two teams try to put a ball into a goal. Each team has eleven players. | Only the goalkeeper may use the hands.
chess | Chess is a board game for two players. The aim is to trap the king of the other player. | Each player begins with sixteen pieces.
a bicycle, bicycles, a bike | A bicycle has two wheels and is moved by the legs of the rider. | It needs no fuel.
a train, trains | A train is a row of wagons that runs on rails. | Trains can carry very many people.
an airplane, airplanes, a plane | An airplane is a machine that flies with wings and engines. | The wings push the air down, and so the plane stays up.
a book, books | A book is a text on many pages that are bound together. | There are books about almost everything.
a library | A library is a place where you can borrow books. | In programming, a library is code that other programs use.
a friend, friends, friendship | A friend is somebody whom you like and trust. | Good friends listen and help each other.
love | Love is a strong and warm feeling for somebody or something. | I am a program and cannot feel it, but I know that it matters to people.
sleep | Sleep is the rest that body and mind need each night. Most grown people need seven to nine hours. | A dark and quiet room helps.
democracy | In a democracy the people choose by votes who governs them. | The votes should be free and secret.
money | Money is what people use to pay for things. | It can be coins, paper or just numbers in a bank.
electricity | Electricity is the flow of tiny charged particles. It powers lamps, trains and computers. | It moves well through metal.
light | Light is what lets us see. Nothing travels faster than light. | It goes about 300000 kilometres in one second.
sound | Sound is a wave that moves through air, water or solid things. | It needs about three seconds for one kilometre of air.
the heart | The heart is a muscle that pumps blood through the body. | It beats about seventy times each minute.
the brain | The brain is the organ with which we think and feel. | It is protected by the skull.
oxygen | Oxygen is a gas in the air. People and animals need it to breathe. | Plants give it off.
gold | Gold is a soft yellow metal that does not rust. | It is rare, and so it is dear.
iron | Iron is a strong metal. When it gets wet, it can rust. | Steel is made from iron.
a dinosaur, dinosaurs | Dinosaurs were animals that lived many millions of years ago. | Birds are their living relatives.
"""
WORLD += world.MORE.lstrip()
WHY = (
    *world.MORE_WHY,
    ("is the sky blue", "The sky is blue because the air scatters blue light more than red light."),
    ("is grass green, are leaves green", "Leaves are green because of chlorophyll, which plants use to catch light."),
    ("is the sea salty, is the ocean salty", "The sea is salty because rivers wash salt out of the rocks."),
    ("do we sleep, do people sleep", "We sleep because the body and the mind need rest to work well."),
    ("does it rain", "It rains because water rises from the sea as vapour, makes clouds and falls down again."),
    ("do birds fly south", "Many birds fly south because there they find food in the winter."),
    ("do cats purr", "Cats often purr because they feel well."),
    ("is fire hot", "Fire is hot because burning sets energy free."),
    ("does ice float", "Ice floats because it is lighter than water."),
    ("do we have seasons, are there seasons", "We have seasons because the axis of the Earth is tilted."),
    ("do leaves fall, do trees lose their leaves", "Many trees drop their leaves to save water in the winter."),
    ("do you exist, were you made", "I was made so that people can try cloister without a large model."),
    ("should i trust you", "Do not trust me for facts, because I am a toy. For privacy, look at what your client verified."),
    ("are you so small", "I am small so that I run anywhere and come with cloister. A larger model can be loaded instead."),
    ("is privacy important, does privacy matter", "Privacy matters because people should decide themselves who knows what about them."),
    ("do i need attestation, is attestation important", "You need attestation because otherwise you cannot know which code gets your data."),
)  # fmt: skip
HOWTO = (
    *world.MORE_HOWTO,
    ("make tea", "Boil water, pour it over the tea, wait three to five minutes, and take the tea out."),
    ("make coffee", "Put ground coffee into a filter, pour hot water over it slowly, and wait until it has run through."),
    ("boil an egg", "Put the egg into boiling water. After five minutes it is soft, after ten minutes it is hard."),
    ("cook rice", "Take one cup of rice and two cups of water, bring it to the boil, and let it rest on a low heat until the water is gone."),
    ("cook pasta", "Boil plenty of water with salt, add the pasta, and cook it for about ten minutes."),
    ("make a sandwich", "Take two slices of bread, put butter and cheese between them, and add some salad if you like."),
    ("bake bread", "Mix flour, water, salt and yeast, let the dough rise for an hour, and bake it until it is brown."),
    ("make pancakes", "Mix flour, milk and eggs, pour a little into a hot pan, and turn it when it is brown."),
    ("fall asleep, sleep better", "Make the room dark and quiet, put the screens away, and go to bed at the same time each day."),
    ("wash my hands", "Use water and soap, rub the hands for twenty seconds, and rinse them well."),
    ("plant a tree", "Dig a hole, put the roots in, fill it with earth, and give it plenty of water."),
    ("water plants", "Give them water when the earth feels dry, and not too much."),
    ("learn a language", "Practise a little each day, listen a lot, and speak without fear of mistakes."),
    ("learn to program", "Begin with small programs, change them, and see what happens. Python is a good first language."),
    ("make friends", "Be kind, listen to people, and join others in something that you like."),
    ("write a letter", "Begin with a greeting, say why you write, be clear, and end with good wishes and your name."),
    ("clean a window", "Wash it with warm water and a little soap, and dry it with a cloth."),
    ("choose a password, make a good password", "Take four or more random words, or let a password manager make a long one."),
    ("verify an enclave, verify the server, check the attestation", "Run cloister verify with the address of the server, and read each factor that it prints."),
    ("start cloister, run cloister, try cloister", "Type make run. It starts a model in a simulated enclave, verifies it and opens a chat."),
    ("use another model, use a better model, load a bigger model", "Give cloister serve the path of a GGUF file, or a name such as hf.co/org/repo."),
    ("save energy", "Switch off what you do not use, and close the windows when you heat."),
    ("calm down, relax", "Breathe slowly, go for a short walk, or talk to somebody whom you like."),
    ("study better, study", "Study in short parts, make pauses, and explain to somebody what you have learned."),
)  # fmt: skip
CAPITALS = dict(
    pair.split(":")
    for pair in [
        "France:Paris",
        "Germany:Berlin",
        "Italy:Rome",
        "Spain:Madrid",
        "Portugal:Lisbon",
        "Japan:Tokyo",
        "China:Beijing",
        "India:New_Delhi",
        "Canada:Ottawa",
        "Egypt:Cairo",
        "Kenya:Nairobi",
        "Brazil:Brasilia",
        "Argentina:Buenos_Aires",
        "Norway:Oslo",
        "Sweden:Stockholm",
        "Finland:Helsinki",
        "Denmark:Copenhagen",
        "Poland:Warsaw",
        "Austria:Vienna",
        "Greece:Athens",
        "Turkey:Ankara",
        "Ireland:Dublin",
        "Belgium:Brussels",
        "Russia:Moscow",
        "Australia:Canberra",
        "Mexico:Mexico_City",
        "Peru:Lima",
        "Chile:Santiago",
        "England:London",
        "Hungary:Budapest",
        "Ukraine:Kyiv",
        "Romania:Bucharest",
        "Bulgaria:Sofia",
        "Croatia:Zagreb",
        "Serbia:Belgrade",
        "Cuba:Havana",
        "Iran:Tehran",
        "Iraq:Baghdad",
        "Thailand:Bangkok",
        "Vietnam:Hanoi",
        "Scotland:Edinburgh",
        "Iceland:Reykjavik",
        "Morocco:Rabat",
        "Ghana:Accra",
        "Ethiopia:Addis_Ababa",
        "Nepal:Kathmandu",
        "Colombia:Bogota",
    ]
)
CAPITALS = {country: city.replace("_", " ") for country, city in CAPITALS.items()}
COLOURS = {"the sky": "blue", "grass": "green", "snow": "white", "a banana": "yellow", "blood": "red", "coal": "black", "milk": "white", "a lemon": "yellow", "an orange": "orange", "a tomato": "red", "chocolate": "brown", "a carrot": "orange", "the sun": "yellow", "a leaf": "green", "an elephant": "grey", "the sea": "blue", "a strawberry": "red", "gold": "yellow", "a frog": "green", "a polar bear": "white"}  # fmt: skip
SOUNDS = {"a dog": "woof", "a cat": "meow", "a cow": "moo", "a sheep": "baa", "a duck": "quack", "a pig": "oink", "a bee": "buzz", "a lion": "roar", "a horse": "neigh", "a frog": "ribbit"}  # fmt: skip
LEGS = {"a dog": "four", "a cat": "four", "a spider": "eight", "an insect": "six", "a bird": "two", "a horse": "four", "a human": "two", "a snake": "no", "an ant": "six", "a bee": "six", "a fish": "no"}  # fmt: skip
OPPOSITES = [
    "hot:cold",
    "big:small",
    "fast:slow",
    "up:down",
    "left:right",
    "good:bad",
    "happy:sad",
    "light:dark",
    "old:new",
    "open:closed",
    "early:late",
    "near:far",
    "hard:soft",
    "rich:poor",
    "strong:weak",
    "full:empty",
    "wet:dry",
    "long:short",
    "loud:quiet",
    "true:false",
    "day:night",
    "black:white",
    "high:low",
    "begin:end",
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
GREETINGS = {"French": "Bonjour", "Spanish": "Hola", "German": "Hallo", "Italian": "Ciao", "Portuguese": "Olá", "Dutch": "Hallo", "Swedish": "Hej"}  # fmt: skip
THANKS = {"French": "Merci", "Spanish": "Gracias", "German": "Danke", "Italian": "Grazie", "Portuguese": "Obrigado", "Dutch": "Dank je", "Swedish": "Tack"}  # fmt: skip
JOKES = (
    *world.MORE_JOKES,
    "Why did the computer go to the doctor? Because it had a virus.",
    "Why was the maths book sad? Because it had too many problems.",
    "What do you call a bear without teeth? A gummy bear.",
    "Why do bees hum? Because they do not know the words.",
    "What did the zero say to the eight? Nice belt!",
    "Why did the enclave go to the party? It wanted to be seen, but only after it was verified.",
    "How does a cat sing scales? Do, re, mi, meow.",
    "What is a computer's favourite snack? Microchips.",
    "Why did the key break up with the lock? It felt turned around.",
    "Why was the nonce so lonely? It was only used once.",
)  # fmt: skip
FUN = (
    *world.MORE_FUN,
    "An octopus has three hearts.",
    "Honey can stay good for a very long time.",
    "A day on Venus is longer than its year.",
    "Bananas are berries, but strawberries are not.",
    "Light from the sun needs about eight minutes to reach us.",
    "A snail can have thousands of tiny teeth.",
    "Ice floats because it is lighter than water.",
    "A group of crows is called a murder.",
)
UNKNOWN = """
bitcoin|the stock market|string theory|black holes|the Roman Empire|Napoleon|Shakespeare|Einstein|Mozart|the French Revolution|World War Two|the Cold War|philosophy|psychology|economics|algebra|calculus|
geometry|statistics|trigonometry|genetics|DNA|evolution|chemistry|atoms|molecules|magnets|lasers|rockets|satellites|the space station|galaxies|comets|tennis|basketball|baseball|cricket|golf|hockey|skiing|
boxing|yoga|swimming|surfing|marathons|the Olympics|movies|film noir|video games|anime|opera|ballet|jazz|hip hop|rock music|painting|sculpture|photography|architecture|fashion|jewellery|perfume|make-up|
knitting|sewing|carpentry|plumbing|gardening tools|tractors|engines|diesel|batteries|solar panels|nuclear power|wind turbines|bridges|tunnels|skyscrapers|castles|pyramids|temples|cathedrals|museums|
universities|kindergartens|taxes|mortgages|insurance|pensions|startups|marketing|advertising|accounting|contracts|patents|copyright|elections|parliaments|presidents|kings|queens|pirates|knights|vikings|
samurai|ninjas|dragons|unicorns|vampires|ghosts|witches|wizards|aliens|zombies|crocodiles|penguins|giraffes|zebras|kangaroos|koalas|dolphins|sharks|octopuses|jellyfish|crabs|lobsters|snails|worms|
mosquitoes|eagles|owls|parrots|ducks|swans|peacocks|camels|goats|donkeys|wolves|deer|moose|hamsters|squirrels|hedgehogs|bats|mice|rats|snakes|lizards|turtles|sushi|pasta recipes|curry|tacos|burgers|
noodles|soup|salad|lasagne|wine|beer|whisky|cocktails|lemonade|strawberries|mangoes|grapes|oranges|potatoes|tomatoes|onions|garlic|pepper|cinnamon|vanilla|Java|JavaScript|Rust|Haskell|Kubernetes|Docker|
databases|SQL|compilers|blockchains|smartphones|televisions|cameras|headphones|keyboards|printers|drones|3D printing|virtual reality|self-driving cars|electric cars|motorcycles|trucks|ships|submarines|
helicopters|hot air balloons|elevators|traffic lights|Texas|California|New York|Tokyo Tower|the Eiffel Tower|the Great Wall|Antarctica|Greenland|the Amazon|the Nile|the Alps|Hawaii|Siberia|Madagascar|
Bavaria|Catalonia|Buddhism|Christianity|Islam|Hinduism|yoga mats|astrology|tarot cards|magic tricks|juggling|origami|crosswords|sudoku|poker|backgammon|dominoes|marbles|kites|dolls|teddy bears|
the Beatles|Leonardo da Vinci|Picasso|Cleopatra|Julius Caesar|Marie Curie|Isaac Newton|Galileo|Darwin|Gandhi|Beethoven|Bach|Homer|Plato|Socrates|Aristotle|Confucius|Tolstoy|Kafka|Hemingway
""".replace("\n", "").split("|")  # fmt: skip
KNOWN = {known.strip() for line in (WORLD + PRIVACY + world.PEOPLE).strip().splitlines() for known in line.split(" | ")[0].split(",")}  # fmt: skip
UNKNOWN = [topic for topic in UNKNOWN if topic not in KNOWN]
NAMES = [
    "Ada",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Henry",
    "Ida",
    "Jack",
    "Kate",
    "Leo",
    "Mia",
    "Noah",
    "Olga",
    "Paul",
    "Quinn",
    "Rosa",
    "Sam",
    "Tina",
    "Uma",
    "Victor",
    "Wendy",
    "Xavier",
    "Yara",
    "Zoe",
    "Anna",
    "Bob",
    "Carlos",
    "Dora",
    "Eric",
    "Fiona",
    "George",
    "Hannah",
    "Ivan",
    "Julia",
    "Karim",
    "Linda",
    "Marco",
    "Nina",
    "Omar",
    "Petra",
    "Ravi",
    "Sara",
    "Tom",
    "Vera",
    "Will",
    "Alice",
    "Charlie",
    "Maria",
    "John",
    "Peter",
    "Lucy",
    "Max",
    "Nora",
    "Oscar",
    "Priya",
    "Yuki",
    "Chen",
    "Fatima",
]
THINGS = [
    "cat",
    "dog",
    "fox",
    "bird",
    "rabbit",
    "bear",
    "mouse",
    "robot",
    "dragon",
    "child",
    "girl",
    "boy",
    "king",
    "queen",
    "sailor",
    "baker",
    "wizard",
    "tree",
    "star",
    "cloud",
    "river",
    "flower",
    "boat",
    "horse",
    "frog",
    "bee",
    "owl",
    "lion",
    "elephant",
    "turtle",
    "princess",
    "knight",
    "farmer",
    "painter",
    "teacher",
    "doctor",
    "clown",
    "ghost",
    "snowman",
    "whale",
]
FOODS = [
    "pizza",
    "soup",
    "bread",
    "rice",
    "cheese",
    "apples",
    "chocolate",
    "pancakes",
    "salad",
    "noodles",
    "cake",
    "honey",
    "pasta",
    "tomatoes",
    "ice_cream",
    "bananas",
    "potatoes",
    "curry",
    "cookies",
    "strawberries",
]
HOBBIES = [
    "reading",
    "painting",
    "swimming",
    "running",
    "cooking",
    "dancing",
    "singing",
    "hiking",
    "chess",
    "football",
    "gardening",
    "cycling",
    "fishing",
    "drawing",
    "knitting",
    "travelling",
    "sailing",
    "climbing",
]
CITIES = [
    "Berlin",
    "Paris",
    "London",
    "Madrid",
    "Rome",
    "Vienna",
    "Oslo",
    "Dublin",
    "Lisbon",
    "Prague",
    "Boston",
    "Chicago",
    "Denver",
    "Toronto",
    "Sydney",
    "Osaka",
    "Mumbai",
    "Cairo",
    "Lagos",
    "Lima",
    "Hamburg",
    "Lyon",
    "Porto",
    "Seattle",
]
COLOUR_NAMES = ["red", "blue", "green", "yellow", "orange", "purple", "black", "white", "pink", "brown", "grey"]
