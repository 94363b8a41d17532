"""Prompts for real models. They are tokenised when goldens are made; what counts afterwards are the ids in the golden files."""

CHAT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def chatml(*turns, system=CHAT_SYSTEM):
    """turns: user, assistant, user, ... as ChatML text that asks for the next assistant turn."""
    text = f"<|im_start|>system\n{system}<|im_end|>\n"
    for i, turn in enumerate(turns):
        text += f"<|im_start|>{('user', 'assistant')[i % 2]}\n{turn}<|im_end|>\n"
    return text + "<|im_start|>assistant\n"


OCEAN = """The deep ocean is the largest habitat on Earth, and the least known. Below two hundred metres sunlight fades; below a
thousand there is none, and the only light is made by animals. Pressure grows by one atmosphere every ten metres, so that a
fish at four thousand metres carries the weight of four hundred atmospheres, yet its body, mostly water, is hardly squeezed.
Food arrives as a slow fall of particles from above, called marine snow: dead plankton, droppings, scales, mucus. A whale that
dies and sinks is a feast that can last for decades. First come sleeper sharks and hagfish, then crabs and worms that graze on
what is left, and at last bacteria that live on the fat inside the bones and feed, in their turn, clams and mussels.

Around hydrothermal vents, discovered in 1977 near the Galapagos, whole communities live without the sun. Water seeps into the
crust, is heated by magma to more than 350 degrees, and returns laden with sulphides. Microbes oxidise these compounds and build
sugars with the energy they gain; tube worms two metres long have neither mouth nor gut and depend on such microbes in their
tissues. Their discovery changed how biologists think about the origin of life and about where else it could exist, for example
in the ocean beneath the ice of Europa, a moon of Jupiter, or of Enceladus, a moon of Saturn.

In summary, the three most important points of this text are:
1."""

QUICKSORT = """def quicksort(items):
    \"\"\"Returns a sorted copy of items.\"\"\"
    if len(items) <= 1:
        return list(items)
    pivot = items[len(items) // 2]
    smaller = [x for x in items if x < pivot]
    equal = [x for x in items if x == pivot]
    larger = [x for x in items if x > pivot]
    return"""

C_CODE = """#include <stdio.h>

static int gcd(int a, int b) {
  while (b != 0) {
    int t = a % b;
    a = b;
    b = t;
  }
  return a;
}

int main(void) {
  for (int i = 1; i <= 10; i++) {
    printf("gcd(%d, 60) = %d\\n", i,"""

PROMPTS = [
    ("one_token", "The"),
    ("newline", "\n"),
    ("two_tokens", "Once upon"),
    ("fox", "The quick brown fox jumps over the"),
    ("capital", "The capital of France is"),
    ("counting", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,"),
    ("fairy_tale", "Once upon a time, in a small village at the foot of a mountain, there lived an old clockmaker who"),
    ("physics", "Newton's second law of motion states that the force acting on an object is equal to"),
    ("arithmetic", "Question: Anna has 12 apples. She gives 5 to Ben and buys 7 more. How many apples does she have?\nAnswer:"),
    ("quicksort", QUICKSORT),
    ("c_code", C_CODE),
    ("json", '{"name": "Ada Lovelace", "born": 1815, "fields": ["mathematics", "computing"], "known_for":'),
    ("sql", "CREATE TABLE orders (\n  id INTEGER PRIMARY KEY,\n  customer_id INTEGER NOT NULL,\n"),
    ("html", "<!DOCTYPE html>\n<html>\n  <head>\n    <title>My page</title>\n  </head>\n  <body>\n    <h1>"),
    ("french", "Il était une fois, dans un petit village de Provence, un boulanger qui"),
    ("german", "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist"),
    ("spanish", "En un lugar de la Mancha, de cuyo nombre no quiero acordarme,"),
    ("japanese", "吾輩は猫である。名前はまだ無い。どこで生れたか"),
    ("russian_emoji", "Привет, как дела? 😀🚀 Всё хорошо,"),
    ("chat_capital", chatml("What is the capital of France?")),
    ("chat_haiku", chatml("Write a haiku about the sea.", system="You are a poet. Answer in verse only.")),
    ("chat_turns", chatml("Hello! Who are you?", "I'm SmolLM, an AI assistant. How can I help you today?",
                          "Give me three tips for learning to play the violin.")),
    ("ocean_half", OCEAN[:OCEAN.index("Around hydrothermal")]),
    ("ocean", OCEAN),
]
