"""Words of everyday English, by kind, for the tasks in ``tasks`` and the stories in ``tales``."""

from __future__ import annotations

KINDS = {
    "fruit": "apple,pear,banana,cherry,plum,peach,orange,lemon,grape,melon,mango,kiwi,fig,apricot,pineapple",
    "vegetable": "carrot,potato,onion,bean,pea,cabbage,spinach,radish,pumpkin,leek,cucumber,turnip,beet,celery",
    "animal": "cat,dog,horse,cow,sheep,goat,pig,rabbit,fox,wolf,bear,lion,tiger,elephant,giraffe,zebra,camel,mouse",
    "bird": "eagle,owl,sparrow,robin,swan,duck,goose,parrot,crow,penguin,pigeon,stork,heron,gull",
    "fish": "salmon,trout,tuna,cod,herring,carp,pike,eel,perch,shark",
    "insect": "ant,bee,wasp,beetle,butterfly,moth,fly,mosquito,cricket,ladybird",
    "flower": "rose,tulip,daisy,lily,violet,poppy,sunflower,orchid,daffodil,iris",
    "tree": "oak,birch,pine,maple,willow,beech,elm,ash,cedar,poplar",
    "colour": "red,blue,green,yellow,orange,purple,black,white,pink,brown,grey",
    "country": "France,Germany,Italy,Spain,Japan,China,India,Canada,Egypt,Kenya,Brazil,Norway,Sweden,Poland,Greece,Peru",
    "city": "Paris,Berlin,Rome,Madrid,Tokyo,Oslo,Vienna,Lisbon,Dublin,Prague,Cairo,Lima,London,Athens",
    "planet": "Mercury,Venus,Earth,Mars,Jupiter,Saturn,Uranus,Neptune",
    "drink": "water,tea,coffee,milk,juice,lemonade,cocoa,cider",
    "tool": "hammer,saw,drill,wrench,screwdriver,spade,rake,axe,ladder,knife",
    "instrument": "piano,guitar,violin,flute,drum,trumpet,harp,cello,clarinet,organ",
    "metal": "iron,gold,silver,copper,tin,lead,zinc,nickel",
    "sport": "football,tennis,swimming,running,cycling,hockey,rowing,boxing,golf,skiing",
    "piece of clothing": "shirt,coat,hat,scarf,sock,shoe,glove,skirt,jacket,belt",
    "piece of furniture": "table,chair,bed,sofa,shelf,desk,bench,wardrobe",
    "vehicle": "car,bus,train,bicycle,boat,ship,plane,tram,truck,ferry",
    "part of the body": "hand,foot,head,arm,leg,nose,ear,eye,knee,finger",
    "job": "baker,teacher,doctor,farmer,painter,sailor,nurse,cook,pilot,writer,gardener,carpenter",
    "TEE": "Intel SGX,Intel TDX,AMD SEV-SNP,AWS Nitro Enclaves",
}  # fmt: skip
KINDS = {kind: words.split(",") for kind, words in KINDS.items()}
MANY = {"fish": "fish", "country": "countries", "city": "cities", "piece of clothing": "pieces of clothing", "piece of furniture": "pieces of furniture", "part of the body": "parts of the body"}  # fmt: skip
THINGS = ["apple", "ball", "book", "box", "bread", "bridge", "button", "cake", "candle", "chair", "clock", "coat", "coin", "cup", "door", "drum", "egg", "feather", "flag", "garden", "glass", "hammer", "hat", "house", "island", "key", "kite", "ladder", "lamp", "leaf", "letter", "map", "mirror", "moon", "nest", "net", "pencil", "phone", "pillow", "plate", "radio", "ring", "road", "rope", "sail", "shell", "shoe", "spoon", "stone", "table", "tent", "tower", "train", "umbrella", "wagon", "wheel", "whistle", "window", "garlic", "engine", "gearbox", "bicycle", "piano", "sweater", "bottle", "basket", "bell", "brush", "camera", "cart"]  # fmt: skip
PLACES = ["market", "river", "forest", "station", "library", "school", "garden", "harbour", "museum", "park", "beach", "bakery", "mill", "hill", "castle", "lake", "village", "bridge", "lighthouse", "theatre", "hospital", "office", "farm", "zoo"]  # fmt: skip
ADJECTIVES = ["small", "old", "red", "blue", "quiet", "bright", "heavy", "light", "soft", "warm", "cold", "round", "broken", "golden", "strange", "dusty", "tiny", "huge", "wooden", "green", "silver", "empty", "new", "pretty"]  # fmt: skip
YOUNG = {"cat": "kitten", "dog": "puppy", "cow": "calf", "horse": "foal", "sheep": "lamb", "pig": "piglet", "goat": "kid", "bear": "cub", "lion": "cub", "duck": "duckling", "goose": "gosling", "swan": "cygnet", "hen": "chick", "frog": "tadpole", "owl": "owlet", "deer": "fawn"}  # fmt: skip
HOMES = {"bird": "nest", "bee": "hive", "fox": "den", "horse": "stable", "spider": "web", "rabbit": "burrow", "bear": "cave", "dog": "kennel", "pig": "sty", "fish": "sea", "camel": "desert", "penguin": "cold south", "ant": "anthill"}  # fmt: skip
MADE_OF = {"bread": "flour, water, salt and yeast", "glass": "sand", "paper": "wood", "cheese": "milk", "butter": "cream", "a candle": "wax", "wine": "grapes", "a tyre": "rubber", "a brick": "clay", "steel": "iron and a little carbon", "chocolate": "cocoa beans and sugar", "wool": "the hair of sheep", "silk": "the thread of silkworms", "a book": "paper", "snow": "small ice crystals", "a window": "glass", "an omelette": "eggs", "raisins": "dried grapes", "cotton cloth": "the fibres of the cotton plant", "leather": "the skin of animals"}  # fmt: skip
USED_FOR = {"a hammer": "driving nails", "a knife": "cutting", "a key": "opening a lock", "an umbrella": "keeping off the rain", "a clock": "telling the time", "a pen": "writing", "a lamp": "giving light", "a bed": "sleeping", "a ladder": "climbing up", "a broom": "sweeping the floor", "a boat": "travelling on water", "scissors": "cutting paper and cloth", "a thermometer": "measuring how warm it is", "a telescope": "looking at the stars", "a microscope": "looking at tiny things", "soap": "washing", "a needle": "sewing", "a map": "finding the way", "an oven": "baking", "a camera": "taking pictures", "a compass": "finding north", "a bridge": "crossing a river", "a bucket": "carrying water", "glasses": "seeing better"}  # fmt: skip
SAME = {"big": "large", "small": "little", "happy": "glad", "sad": "unhappy", "fast": "quick", "begin": "start", "end": "finish", "clever": "smart", "angry": "cross", "quiet": "silent", "hard": "difficult", "easy": "simple", "rich": "wealthy", "brave": "bold", "tired": "weary", "strange": "odd", "wet": "damp", "shut": "close", "choose": "pick", "help": "aid", "gift": "present", "ill": "sick", "near": "close", "speak": "talk", "look": "gaze", "jump": "leap", "road": "street", "stone": "rock", "fear": "dread", "error": "mistake"}  # fmt: skip
RHYMES = [line.split(",") for line in ("cat,hat,mat,bat", "sun,run,fun,bun", "tree,bee,sea,free", "light,night,bright,kite", "rain,train,plane,lane", "moon,spoon,soon,noon", "house,mouse", "star,car,far,jar", "day,play,way,grey", "ring,king,sing,wing", "cake,lake,snake,make", "boat,coat,goat,note", "bear,chair,hair,pear", "fox,box,socks", "book,cook,look,hook", "dog,frog,fog,log", "key,tea,me,knee", "bell,well,shell,tell", "ball,wall,tall,small", "snow,blow,grow,slow", "nose,rose,toes,goes", "bread,bed,red,head")]  # fmt: skip
PAST = {"walk": "walked", "see": "saw", "find": "found", "buy": "bought", "eat": "ate", "take": "took", "open": "opened", "paint": "painted", "carry": "carried", "hold": "held", "clean": "cleaned", "bring": "brought", "lose": "lost", "make": "made", "break": "broke", "draw": "drew", "want": "wanted", "like": "liked", "watch": "watched", "sell": "sold", "hide": "hid", "wash": "washed", "mend": "mended", "send": "sent", "choose": "chose", "forget": "forgot", "need": "needed", "give": "gave"}  # fmt: skip
PLURALS = {"mouse": "mice", "child": "children", "foot": "feet", "tooth": "teeth", "man": "men", "woman": "women", "goose": "geese", "knife": "knives", "leaf": "leaves", "wolf": "wolves", "box": "boxes", "city": "cities", "baby": "babies", "bus": "buses", "potato": "potatoes", "sheep": "sheep", "fish": "fish", "wife": "wives", "shelf": "shelves", "story": "stories"}  # fmt: skip
ABROAD = {
    "German": "hello:hallo,yes:ja,no:nein,please:bitte,water:Wasser,bread:Brot,house:Haus,dog:Hund,cat:Katze,sun:Sonne,friend:Freund,red:rot,blue:blau,green:grün,one:eins,two:zwei,three:drei,good:gut,day:Tag,night:Nacht,book:Buch,tree:Baum",
    "French": "hello:bonjour,yes:oui,no:non,please:s'il vous plaît,water:eau,bread:pain,house:maison,dog:chien,cat:chat,sun:soleil,friend:ami,red:rouge,blue:bleu,green:vert,one:un,two:deux,three:trois,good:bon,day:jour,night:nuit,book:livre,tree:arbre",
    "Spanish": "hello:hola,yes:sí,no:no,please:por favor,water:agua,bread:pan,house:casa,dog:perro,cat:gato,sun:sol,friend:amigo,red:rojo,blue:azul,green:verde,one:uno,two:dos,three:tres,good:bueno,day:día,night:noche,book:libro,tree:árbol",
    "Italian": "hello:ciao,yes:sì,no:no,please:per favore,water:acqua,bread:pane,house:casa,dog:cane,cat:gatto,sun:sole,friend:amico,red:rosso,blue:blu,green:verde,one:uno,two:due,three:tre,good:buono,day:giorno,night:notte,book:libro,tree:albero",
}  # fmt: skip
ABROAD = {tongue: dict(pair.split(":") for pair in words.split(",")) for tongue, words in ABROAD.items()}
RIDDLES = (
    ("What has hands but cannot clap?", "a clock"), ("What has keys but opens no door?", "a piano"), ("What gets wetter the more it dries?", "a towel"), ("What has a neck but no head?", "a bottle"),
    ("What has teeth but cannot bite?", "a comb"), ("What goes up but never comes down?", "your age"), ("What can you catch but not throw?", "a cold"), ("What has one eye but cannot look?", "a needle"),
    ("What runs but has no legs?", "a river"), ("What is full of holes but holds water?", "a sponge"), ("What must be broken before you can use it?", "an egg"), ("What has many leaves but is no tree?", "a book"),
    ("What can be used only once and keeps a protocol fresh?", "a nonce"), ("What changes completely when one letter changes?", "a hash"),
)  # fmt: skip
PROVERBS = ("Many hands make light work.", "Practice makes perfect.", "Better late than never.", "The early bird catches the worm.", "Actions speak louder than words.", "Look before you leap.", "A friend in need is a friend indeed.", "Every cloud has a silver lining.", "Slow and steady wins the race.", "Trust, but verify.", "Honesty is the best policy.", "Two heads are better than one.")  # fmt: skip
GOOD = ("I love this X.", "The X was wonderful.", "What a lovely X!", "I am very happy with the X.", "The X works very well.", "This is the best X that I ever had.", "Thank you for the great X.", "The X made my day.", "I enjoyed the X a lot.", "Everybody liked the X.")  # fmt: skip
BAD = ("I hate this X.", "The X was terrible.", "What an ugly X!", "I am very unhappy with the X.", "The X does not work at all.", "This is the worst X that I ever had.", "I want my money back for the X.", "The X ruined my day.", "I was bored by the X.", "Nobody liked the X.")  # fmt: skip
WRONG = (
    ("She go to school.", "She goes to school."), ("He have a dog.", "He has a dog."), ("They was happy.", "They were happy."), ("I has two cats.", "I have two cats."), ("We is late.", "We are late."),
    ("The dogs barks.", "The dogs bark."), ("He do not know.", "He does not know."), ("I seen it yesterday.", "I saw it yesterday."), ("She are my friend.", "She is my friend."), ("It rain today.", "It rains today."),
    ("There is two books.", "There are two books."), ("I am agree.", "I agree."), ("He can sings.", "He can sing."), ("They goes home.", "They go home."), ("A apple is red.", "An apple is red."), ("I want a orange.", "I want an orange."),
)  # fmt: skip
IDEAS = {
    "dinner": "{tomato soup with bread|rice with beans|pancakes with apples|noodles with vegetables|a potato salad|an omelette with cheese|fish with lemon|a bowl of curry}",
    "a gift": "{a good book|a warm scarf|a plant for the window|a jar of honey|a photo in a frame|a box of tea|tickets for a concert|a hand-written letter}",
    "the weekend": "{a walk by the river|a visit to a museum|baking bread together|a board game with friends|a bicycle tour|an afternoon in the library|a picnic in the park|planting some herbs}",
    "a rainy day": "{reading a long book|baking a cake|a game of chess|drawing with pencils|writing a letter|sorting old photos|a film and some tea}",
    "a hobby": "{painting|gardening|playing the flute|chess|cycling|baking|learning a language|sewing}",
    "breakfast": "{bread with honey|porridge with fruit|eggs and toast|yoghurt with berries|pancakes}",
    "a birthday party": "{a treasure hunt|a picnic in the garden|baking pizza together|a small concert|games and a big cake}",
}  # fmt: skip
