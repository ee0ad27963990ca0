// Runs the fuzz target without libFuzzer: over a corpus, and over random changes of it.
//
//     scheduler_fuzz_replay [--runs N] [--seconds S] [--seed N] [FILE|DIRECTORY...]
//     scheduler_fuzz_replay --transcript FILE
//
// An input that breaks an invariant is written to ./broken-SEED-N, and the program aborts. `--transcript` writes one
// input as a transcript, line by line as it runs.
#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <random>
#include <vector>

#include "target.hpp"

namespace {

using Bytes = std::vector<std::uint8_t>;

Bytes read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

struct Options {
  std::uint64_t runs = 0;
  double seconds = 0;
  std::uint64_t seed = 1;
  std::vector<std::filesystem::path> files;
};

/// A change of one of the inputs: bytes set, inserted or cut out, the end of another one behind it, or all new ones.
Bytes mutate(const std::vector<Bytes>& corpus, std::mt19937_64& random) {
  const auto pick = [&](std::size_t bound) {
    return static_cast<std::size_t>(random() % std::max<std::size_t>(1, bound));
  };
  Bytes input = corpus.empty() || pick(4) == 0 ? Bytes() : corpus[pick(corpus.size())];
  if (input.empty()) {
    input.resize(20 + pick(1200));
    for (auto& byte : input) byte = static_cast<std::uint8_t>(random());
  }
  for (std::size_t i = pick(12); i > 0; --i) {
    const std::size_t at = pick(input.size());
    if (pick(3) == 0) {
      input.insert(input.begin() + static_cast<std::ptrdiff_t>(at), static_cast<std::uint8_t>(random()));
    } else if (pick(3) == 0 && input.size() > 8) {
      input.erase(input.begin() + static_cast<std::ptrdiff_t>(at));
    } else {
      input[at] = static_cast<std::uint8_t>(random());
    }
  }
  if (!corpus.empty() && pick(4) == 0) {
    const Bytes& other = corpus[pick(corpus.size())];
    input.resize(pick(input.size()));
    input.insert(input.end(), other.begin() + static_cast<std::ptrdiff_t>(pick(other.size())), other.end());
  }
  return input;
}

volatile bool finished = true;
Bytes current;
std::string broken_name;

/// An assertion of the scheduler aborts the process: the input is kept first.
void keep(int) {
  if (!finished) {
    std::ofstream(broken_name, std::ios::binary)
        .write(reinterpret_cast<const char*>(current.data()), static_cast<std::streamsize>(current.size()));
    std::cerr << "the input is in " << broken_name << "; scheduler_fuzz_replay --transcript " << broken_name << "\n";
  }
  std::signal(SIGABRT, SIG_DFL);
}

void run(Bytes input, const std::string& name) {
  current = std::move(input);
  broken_name = name;
  finished = false;
  LLVMFuzzerTestOneInput(current.data(), current.size());
  finished = true;
}

int transcript(const char* path) {
  const Bytes input = read(path);
  const bool held = fuzz::Player(fuzz::Input(input), fuzz::seen(), &std::cout).play(fuzz::events_max);
  return held ? 0 : 1;
}

bool say_what_was_seen() {
  const fuzz::Seen& s = fuzz::seen();
  std::cout << s.inputs << " inputs, " << s.events << " events: preemptions " << s.preemptions << ", aborts "
            << s.aborts << ", cached tokens " << s.cached_tokens << ", output tokens " << s.output_tokens
            << ", evicted blocks " << s.evicted << ", parents " << s.parents << ", refused " << s.rejected
            << ", floor overrides " << s.overrides << ", blocks stored " << s.stored << ", loaded " << s.loaded
            << ", copies failed " << s.copies_failed << ", late " << s.copies_late << ", drafts kept " << s.drafts_kept
            << ", in part " << s.drafts_cut << ", refuted " << s.drafts_refuted << "\nstates:";
  for (const auto& state : s.states) std::cout << " " << state;
  std::cout << "\nreasons: " << s.whys.size() << " of " << tokenrelay::scheduler::why_table.size() << "; never:";
  for (const auto& entry : tokenrelay::scheduler::why_table) {
    if (s.whys.count(entry.why) == 0) std::cout << " " << entry.name;
  }
  std::cout << "\n";
  for (const char* state :
       {"Waiting", "Held", "Prefilling", "Decoding", "Drafted", "Verifying", "Preempting", "Loading"}) {
    if (s.states.count(state) == 0) {
      std::cerr << "no input led to a " << state << " sequence\n";
      return false;
    }
  }
  return s.preemptions > 0 && s.aborts > 0 && s.evicted > 0 && s.cached_tokens > 0 && s.parents > 0 && s.stored > 0 &&
         s.loaded > 0 && s.copies_failed > 0 && s.copies_late > 0 && s.drafts_kept > 0 && s.drafts_cut > 0 &&
         s.drafts_refuted > 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3 && std::strcmp(argv[1], "--transcript") == 0) return transcript(argv[2]);
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const char* value = i + 1 < argc ? argv[i + 1] : "";
    if (word == "--runs") {
      options.runs = std::strtoull(value, nullptr, 10), ++i;
    } else if (word == "--seconds") {
      options.seconds = std::strtod(value, nullptr), ++i;
    } else if (word == "--seed") {
      options.seed = std::strtoull(value, nullptr, 10), ++i;
    } else if (std::filesystem::is_directory(word)) {
      for (const auto& entry : std::filesystem::directory_iterator(word)) options.files.push_back(entry.path());
    } else if (std::filesystem::is_regular_file(word)) {
      options.files.emplace_back(word);
    } else {
      std::cerr << word << " is no file, directory or option\n";
      return 2;
    }
  }
  std::sort(options.files.begin(), options.files.end());
  std::signal(SIGABRT, keep);
  std::vector<Bytes> corpus;
  for (const auto& path : options.files) {
    corpus.push_back(read(path));
    run(corpus.back(), "broken-" + path.filename().string());
  }
  std::mt19937_64 random(options.seed);
  const auto begin = std::chrono::steady_clock::now();
  const auto passed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(); };
  for (std::uint64_t i = 0; i < options.runs || passed() < options.seconds; ++i) {
    run(mutate(corpus, random), "broken-" + std::to_string(options.seed) + "-" + std::to_string(i));
  }
  return say_what_was_seen() ? 0 : 1;
}
