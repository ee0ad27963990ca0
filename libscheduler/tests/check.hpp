// A very small test framework: TEST(name) { CHECK(x); CHECK_EQUAL(a, b); }, and `expect_abort` for assertions that stay
// on. A test program runs all its tests, or those whose names contain its argument, and exits with 1 if a check failed.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

namespace check {

struct Test {
  std::string_view name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

inline int& failures() {
  static int count = 0;
  return count;
}

struct Register {
  Register(std::string_view name, void (*run)()) { tests().push_back({name, run}); }
};

inline void fail(const char* file, int line, const std::string& what) {
  std::cerr << file << ":" << line << ": " << what << "\n";
  ++failures();
}

template <class A, class B>
void equal(const A& a, const B& b, const char* text, const char* file, int line) {
  if (a == b) return;
  std::ostringstream what;
  what << text << ": " << a << " is not " << b;
  fail(file, line, what.str());
}

/// Runs `body` in a child process, which must abort and say `message`.
template <class Body>
void expect_abort(Body body, std::string_view message, const char* file, int line) {
  int pipe_ends[2];
  if (pipe(pipe_ends) != 0) return fail(file, line, "no pipe");
  std::cerr.flush();
  const pid_t child = fork();
  if (child == 0) {
    dup2(pipe_ends[1], STDERR_FILENO);
    close(pipe_ends[0]);
    body();
    _exit(0);
  }
  close(pipe_ends[1]);
  std::string said;
  char buffer[512];
  for (ssize_t size; (size = ::read(pipe_ends[0], buffer, sizeof buffer)) > 0;)
    said.append(buffer, static_cast<std::size_t>(size));
  close(pipe_ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGABRT) fail(file, line, "did not abort: " + said);
  if (said.find(message) == std::string::npos) fail(file, line, "aborted with another message: " + said);
}

inline int run(int argc, char** argv) {
  const std::string_view filter = argc > 1 ? argv[1] : "";
  int ran = 0;
  for (const Test& test : tests()) {
    if (test.name.find(filter) == std::string_view::npos) continue;
    const int before = failures();
    test.run();
    std::cout << (failures() == before ? "ok      " : "FAILED  ") << test.name << "\n";
    ++ran;
  }
  return failures() == 0 && ran > 0 ? 0 : 1;
}

}  // namespace check

#define TEST(name)                                            \
  static void name();                                         \
  static const check::Register register_##name(#name, &name); \
  static void name()
#define CHECK(condition) ((condition) ? static_cast<void>(0) : check::fail(__FILE__, __LINE__, #condition " is false"))
#define CHECK_EQUAL(a, b) check::equal((a), (b), #a, __FILE__, __LINE__)
#define EXPECT_ABORT(message, ...) check::expect_abort([&] { __VA_ARGS__; }, message, __FILE__, __LINE__)
#define CHECK_MAIN \
  int main(int argc, char** argv) { return check::run(argc, argv); }
