"""More of the world in plain true sentences, written for this corpus. The same form as in ``facts``."""

from __future__ import annotations

MORE = """
a penguin, penguins | Penguins are birds that cannot fly, but they swim very well. They live in the cold south. | They eat fish. | Some kinds hold their egg on their feet.
a dolphin, dolphins | Dolphins are clever animals that live in the sea and breathe air. | They talk with clicks and whistles. | They live in groups.
a shark, sharks | Sharks are large fish with many teeth. Most of them do not harm people. | They lived long before the dinosaurs. | Their teeth grow again.
a giraffe, giraffes | Giraffes are the tallest animals on land. They eat leaves from high trees. | They live in Africa. | Their neck has only seven bones, as ours.
a zebra, zebras | Zebras look like horses with black and white stripes. They live in Africa. | No two have the same stripes.
a wolf, wolves | Wolves are wild animals that live and hunt in groups. Dogs come from them. | They howl to call each other.
an owl, owls | Owls are birds that hunt at night. They fly without a sound. | They can turn their head very far.
an eagle, eagles | Eagles are large birds with very sharp eyes. They hunt small animals. | They build their nests high up.
a snake, snakes | Snakes are long animals without legs. Some of them are poisonous. | They smell with their tongue.
a turtle, turtles | Turtles carry a hard shell, into which they can draw their head. Some live for more than a hundred years. | They lay eggs.
a kangaroo, kangaroos | Kangaroos live in Australia and move in big jumps. The mother carries her child in a pouch. | They cannot walk backwards well.
a camel, camels | Camels live in the desert and can go for days without water. Their humps hold fat. | People ride on them.
an octopus, octopuses | An octopus lives in the sea and has eight arms and three hearts. | It can change its colour.
a bat, bats | Bats are the only mammals that can really fly. They find their way by sound. | They sleep upside down.
a mouse, mice | Mice are very small animals with long tails. They eat grain and almost everything else. | Cats like to hunt them.
a hedgehog, hedgehogs | Hedgehogs have thousands of spines. When they are afraid, they roll into a ball. | They sleep through the winter.
a snail, snails | Snails carry their house on their back and move very slowly. | They have many tiny teeth.
an atom, atoms | Atoms are the tiny parts of which all things are made. They have a heavy core and light electrons around it. | A drop of water has more of them than anyone could count.
a molecule, molecules | A molecule is made of atoms that hold together. Water is made of such molecules. | The smallest ones have two atoms.
DNA | DNA is a long molecule that holds the plan of a living thing. It is in almost every cell. | Half of yours comes from each parent.
evolution | Evolution is how living things change over many generations. What helps to survive spreads. | Charles Darwin described it.
a black hole, black holes | A black hole is a place where gravity is so strong that even light cannot leave. | Some are made when a very large star ends.
a galaxy, galaxies | A galaxy is a huge group of stars. Ours is called the Milky Way. | It has more than a hundred billion stars.
a comet, comets | A comet is a ball of ice and dust that goes around the sun. Near the sun it grows a tail. | Some come back again and again.
a magnet, magnets | A magnet pulls iron. It has two ends, north and south; equal ends push each other away. | A compass needle is a small magnet.
a battery, batteries | A battery stores energy and gives it off as electricity. | Some can be charged again.
a solar panel, solar panels, solar power | Solar panels turn sunlight into electricity. They need no fuel. | At night they give nothing.
a wind turbine, wind turbines | A wind turbine turns wind into electricity. Its blades drive a generator. | It needs a windy place.
an engine, engines | An engine turns energy into motion. Many engines burn fuel, others use electricity. | In cloister, the engine is the part that runs the model.
a rocket, rockets | A rocket flies by pushing hot gas out behind it. It also works in empty space. | Rockets bring satellites up.
a satellite, satellites | A satellite goes around the Earth. It can help with maps, weather and calls. | The moon is a natural one.
a telescope, telescopes | A telescope makes far things look near. With it we see stars and planets. | Large ones use mirrors.
the Roman Empire, Rome in old times, the Romans | The Roman Empire was a large empire around the Mediterranean Sea, about two thousand years ago. Its capital was Rome. | They built roads, bridges and baths. | Their language was Latin.
the pyramids, pyramids | The pyramids are huge old graves of the kings of Egypt. They are made of stone. | The largest stands at Giza.
the Great Wall | The Great Wall is a very long old wall in China. It was built to keep enemies out. | It was built over many hundred years.
the Eiffel Tower | The Eiffel Tower is a tall iron tower in Paris. It was built in 1889. | It is about 330 metres high.
the Olympics, the Olympic Games | The Olympics are a large meeting of sports from all over the world, every four years. | The first ones were in old Greece.
the Amazon | The Amazon is a very large river in South America. Around it is a huge rain forest. | Very many kinds of animals live there.
the Nile | The Nile is a very long river in Africa. It flows through Egypt to the sea. | Old Egypt lived from it.
the Alps | The Alps are high mountains in the middle of Europe. The highest one is Mont Blanc. | People ski there in winter.
Antarctica | Antarctica is the cold continent around the South Pole. Almost all of it is covered with ice. | Penguins live on its coast.
Africa | Africa is a large continent with more than fifty countries. The Sahara and the Nile are there. | Lions, elephants and giraffes live there.
Europe | Europe is a continent with more than forty countries. It is north of Africa. | Many languages are spoken there.
Asia | Asia is the largest continent. China, India and Japan are in it. | More than half of all people live there.
Australia | Australia is a country and a continent. Its capital is Canberra. | Kangaroos live there.
tennis | Tennis is a game for two or four players who hit a ball over a net with rackets. | The ball may touch the ground once.
basketball | Basketball is a game in which two teams of five throw a ball into a high basket. | A throw counts one, two or three points.
swimming | Swimming is moving through water with arms and legs. It is good for the whole body. | Everybody should learn it.
yoga | Yoga is an old practice of moving, breathing and resting. It comes from India. | Many people do it to relax.
soup | Soup is a warm meal of water with vegetables, meat or other things in it. | It is good when you are ill.
pasta, noodles | Pasta is made of flour and water, often with eggs. You cook it in hot water. | It is famous in Italy.
sushi | Sushi is a dish from Japan, made of rice with fish or vegetables. | Often it is rolled in seaweed.
a potato, potatoes | Potatoes grow under the earth. You can boil, bake or fry them. | They came to Europe from South America.
a tomato, tomatoes | Tomatoes are red fruits that we use as vegetables. | They came from America.
garlic | Garlic is a plant with a strong taste. Its bulb is used in many dishes. | It smells strongly too.
beer | Beer is a drink made from water, grain, hops and yeast. It contains alcohol. | It is not for children.
wine | Wine is a drink made from grapes. It contains alcohol. | It can be red or white.
a bridge, bridges | A bridge carries a road over a river or a valley. | It can be made of stone, wood or steel.
a castle, castles | A castle is a large strong house with thick walls, built to keep enemies out. | Many have a tower and a gate.
a museum, museums | A museum keeps and shows old or beautiful things. | There you can learn about art and history.
a school, schools | A school is a place where children learn to read, to write and to count, and much more. | Teachers work there.
a university, universities | A university is a place where people study and do research. | After some years you get a degree.
a hospital, hospitals | A hospital is a place where ill people are treated. Doctors and nurses work there. | It is open day and night.
a car, cars | A car is a vehicle with four wheels and an engine. | It runs on fuel or on electricity.
a ship, ships | A ship is a large boat that can cross the sea. | Most goods travel by ship.
a lighthouse | A lighthouse is a tower with a strong light that shows ships the way. | It stands by the sea.
a clock, clocks | A clock shows the time. It has hands or numbers. | I have none, so I never know the time.
paper | Paper is made from wood. We write and print on it. | It was invented in China.
glass | Glass is made from sand that is melted. You can look through it. | It breaks easily.
fire | Fire is burning: a fuel joins with oxygen and gives heat and light. | Without air it goes out.
air | Air is a mix of gases, mostly nitrogen and oxygen. We need it to breathe. | Wind is moving air.
a season, the seasons | A season is a part of the year. There are four: spring, summer, autumn and winter. | They come because the axis of the Earth is tilted.
a language, languages | A language is a way to share thoughts in words. There are several thousand on Earth. | I only know simple English.
a number, numbers | A number says how many or how much. | There is no largest one.
a prime number, prime numbers | A prime number can be divided only by one and by itself. Examples are 2, 3, 5 and 7. | There are endlessly many.
a triangle, triangles | A triangle has three sides and three corners. | Its angles together make 180 degrees.
a circle, circles | A circle is round: all its points are equally far from the middle. | The length around it is about 3.14 times its width.
a square, squares | A square has four equal sides and four right angles. | Its area is one side times itself.
algebra | Algebra is the art of computing with letters that stand for numbers. | It helps to find an unknown number.
history | History is what happened in the past, and the study of it. | It is told by texts and by things that were found.
philosophy | Philosophy asks basic questions: what is true, what is good, how should we live? | It began more than two thousand years ago.
art | Art is what people make to be looked at, heard or felt: pictures, music, poems. | Everybody may like something else.
a poem, poems | A poem is a text in verses. Often it rhymes. | I can write a small one.
a film, films, movies | A film is a row of pictures, shown so fast that they seem to move. | It tells a story in one or two hours.
a video game, video games | A video game is a game that you play on a computer. | Some are played alone, others together.
a smartphone, smartphones | A smartphone is a phone that is also a small computer. | It can take pictures and show maps.
a database, databases | A database is an ordered store of data that a program can search. | Many use a language called SQL.
a compiler, compilers | A compiler turns the text of a program into instructions for the machine. | The engine of cloister is built with one.
a cloud in computing, the cloud, cloud computing | The cloud means computers of somebody else that you use over the internet. | With cloister you can verify first what runs there.
a virus in a computer, a computer virus, malware | A computer virus is a program that spreads by itself and does harm. | Updates and care help against it.
phishing | Phishing is a trick: somebody pretends to be a bank or a friend to get your password. | Look at the address, and do not hurry.
a firewall, firewalls | A firewall lets only chosen connections through. | It does not replace encryption.
a backup, backups | A backup is a second copy of your data, kept in another place. | Try now and then whether it can be read.
a cookie, cookies | A cookie is a small sweet cake. In a browser it is a small note that a web page keeps. | Both are easy to make.
Rust | Rust is a programming language that is fast and careful with memory. | In the world of metal, rust is what happens to wet iron.
Docker, containers, a container | A container packs a program with all that it needs. Docker is a tool for that. | It does not hide the program from the machine's owner.
a neural network, neural networks | A neural network is a program made of many simple parts that learn from examples. | I am one.
machine learning | Machine learning means that a program learns from examples instead of fixed rules. | Language models are made that way.
a transformer, transformers, attention | A transformer is a kind of neural network that looks at all words of a text at once. | I am a small one, with seven layers.
an API | An API is the way in which one program talks to another. | cloister speaks the API of OpenAI, among others.
JSON | JSON is a way to write data as text, with names and values. | I can write small pieces of it.
ChatML | ChatML is a way to mark who says what in a conversation. My template uses it. | Each turn begins with a mark and a role.
"""
PEOPLE = """
Albert Einstein, Einstein | Albert Einstein was a physicist. He is known for the theory of relativity. | He was born in Germany in 1879.
Isaac Newton, Newton | Isaac Newton was an English scientist. He described gravity and motion. | He lived about three hundred years ago.
Marie Curie | Marie Curie was a scientist from Poland who studied radioactivity. She won two Nobel prizes. | She worked in Paris.
Charles Darwin, Darwin | Charles Darwin was an English scientist who described evolution. | He travelled around the world by ship.
Galileo | Galileo was an Italian scientist. With his telescope he saw the moons of Jupiter. | He lived about four hundred years ago.
William Shakespeare, Shakespeare | William Shakespeare was an English writer of plays and poems. He wrote Romeo and Juliet. | He lived about four hundred years ago.
Mozart | Mozart was a composer from Austria. He wrote music when he was a small child. | He was born in Salzburg.
Beethoven | Beethoven was a German composer. He wrote great music even when he could not hear any more. | He wrote nine symphonies.
Leonardo da Vinci | Leonardo da Vinci was an Italian painter and inventor. He painted the Mona Lisa. | He lived about five hundred years ago.
Picasso | Picasso was a Spanish painter. He helped to invent cubism. | He lived in France for a long time.
Cleopatra | Cleopatra was a queen of Egypt, about two thousand years ago. | She is in many stories.
Julius Caesar, Caesar | Julius Caesar was a Roman general and ruler. | A simple cipher is named after him.
Napoleon | Napoleon was a French general who made himself emperor. | He lost his last battle at Waterloo.
Plato | Plato was a philosopher of old Greece. Socrates was his teacher. | He founded a school in Athens.
Socrates | Socrates was a philosopher of old Greece who taught by asking questions. | He wrote nothing himself.
Aristotle | Aristotle was a philosopher of old Greece. He wrote about almost everything. | He was a pupil of Plato.
Gandhi | Gandhi led India to freedom without violence. | He lived from 1869 to 1948.
Ada Lovelace | Ada Lovelace wrote what is often called the first program, about two hundred years ago. | A programming language is named after her.
Alan Turing, Turing | Alan Turing was an English mathematician. He thought about what computers can do before there were any. | He helped to break secret codes in the war.
Nikola Tesla, Tesla | Nikola Tesla was an inventor. He worked on alternating current and motors. | He was born in what is Croatia today.
Galois | Galois was a French mathematician who died very young. | Fields of numbers are named after him, and encryption uses them.
Claude Shannon | Claude Shannon was a mathematician who founded the theory of information. | He also showed what perfect secrecy means.
"""
MORE_WHY = (
    ("do we dream", "Nobody is sure. Dreams may help the brain to sort what happened."), ("is the sunset red, is the sunset orange", "In the evening the light goes a long way through the air, which takes the blue out of it."),
    ("do onions make us cry", "Cut onions set a gas free that stings the eyes."), ("does iron rust", "Iron rusts because it joins with oxygen when it is wet."), ("do we yawn", "Nobody knows exactly. We yawn when we are tired, and when others do."),
    ("does bread rise", "Bread rises because yeast makes gas in the dough."), ("do stars twinkle", "Stars twinkle because the air above us moves."), ("is snow white", "Snow is white because its crystals scatter all colours of light."),
    ("do we need water", "We need water because most of the body is made of it."), ("do giraffes have long necks", "With their long necks giraffes reach leaves that others cannot reach."), ("do boats float", "A boat floats because it pushes away water that is heavier than itself."),
    ("does the moon change its shape, does the moon change", "The moon looks different because we see more or less of its bright side."), ("do I need a policy, is a policy useful", "A policy says what you accept, so that a change does not go by unseen."),
    ("does cloister pad messages, do you pad messages", "Messages are padded so that their size tells less about their content."), ("is simulation not enough, is a simulator not enough", "In simulation the operator can read everything. Only real hardware can change that, and only when it was verified."),
    ("do keys rotate, are keys rotated", "Keys rotate so that a stolen key is useful for a short time only."), ("does an app wait after a restart", "An enclave that ended has lost its keys, so its owner must release them again."),
)  # fmt: skip
MORE_HOWTO = (
    ("repair a bicycle tyre, fix a flat tyre", "Take out the tube, find the hole, clean it, stick a patch on it, and pump it up again."), ("draw a cat", "Draw a circle for the head, two triangles for the ears, two dots, a small nose, and six lines for the whiskers."),
    ("tie a knot", "Cross the two ends, put one under the other, and pull. Do it again, and it holds."), ("make soup", "Cut some vegetables, boil them in water with a little salt for twenty minutes, and add herbs."),
    ("make lemonade", "Mix the juice of two lemons with a litre of water and a little sugar, and cool it."), ("make a paper plane", "Fold the sheet in the middle, fold the corners to the line twice, and fold the wings down."),
    ("read more, read more books", "Keep a book near your bed and read ten minutes each evening."), ("save money", "Write down what you spend, and put a small part aside at the beginning of each month."), ("wake up early", "Go to bed earlier, put the alarm clock far from the bed, and let light in."),
    ("learn maths, learn mathematics", "Practise a little each day, and explain each step to yourself in words."), ("keep my data safe, protect my data", "Use long passwords, keep backups, install updates, and verify before you send."),
    ("train a dog, teach my dog to sit", "Say the word, show it with your hand, and give a small reward at once. Repeat it often."), ("grow tomatoes", "Put them in a warm and sunny place, give them water at the root, and tie them to a stick."),
)  # fmt: skip
MORE_JOKES = (
    "Why did the bicycle fall over? It was two-tired.", "What do you call a sleeping bull? A bulldozer.", "Why can a nose not be twelve inches long? Because then it would be a foot.", "What do you get when you cross a snowman and a dog? Frostbite.",
    "Why did the operator feel left out? He only ever saw ciphertext, and on verified hardware at that.", "Why do programmers like the dark? Because light attracts bugs.", "What kind of tree fits in your hand? A palm tree.", "Why did the hash cross the road? Nobody can compute it backwards.",
    "What did the ocean say to the beach? Nothing, it just waved.", "Why was six afraid of seven? Because seven, eight, nine.", "What is brown and sticky? A stick.", "Why did the tomato turn red? It met the salad dressing.", "What do clouds wear? Thunderwear.",
    "How do trees get online? They log in.", "Why did the policy never go out? It did not trust anybody that it had not pinned.",
)  # fmt: skip
MORE_FUN = (
    "The heart of a blue whale is about as large as a small car.", "Sharks are older than trees.", "A cloud can weigh many hundred tonnes.", "Cows have best friends.", "The smallest bone of the body is in the ear.", "Bees can dance to show the way to flowers.",
    "There are more ways to shuffle a deck of cards than atoms on Earth.", "Water can boil and freeze at the same time, at a certain pressure.", "Penguins give each other stones as presents.", "Butterflies taste with their feet.", "A hash of 256 bits has more values than there are grains of sand on Earth.",
)  # fmt: skip
RANKED = {
    ("bigger", "smaller"): ["an ant", "a bee", "a mouse", "a cat", "a dog", "a sheep", "a horse", "an elephant", "a whale"],
    ("heavier", "lighter"): ["a feather", "a leaf", "a pencil", "an apple", "a brick", "a chair", "a piano", "a car", "a train"],
    ("faster", "slower"): ["a snail", "a turtle", "a person on foot", "a bicycle", "a car", "a train", "a plane", "a rocket"],
    ("hotter", "colder"): ["ice", "cold milk", "a warm bath", "boiling water", "a fire", "lava", "the sun"],
    ("larger", "smaller"): ["an atom", "a grain of sand", "a stone", "a house", "a mountain", "the moon", "the Earth", "the sun", "a galaxy"],
}  # fmt: skip
