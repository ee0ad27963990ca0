// A deadline that asks the reader to be so kind: a dead one is not.
// error: law 3: a deadline takes blocks from a peer that may be reading, without fencing it
#include "loan.hpp"
namespace loan {
struct Reading {
  static constexpr std::string_view name = "Read";
#ifdef MUST_NOT_COMPILE
  static constexpr StateFacts facts{Party::owner, true, Deadline::answer, "Done", Party::claimant};
#else
  static constexpr StateFacts facts = Read::facts;
#endif
};
static_assert(lawful<Loan<rows, Reading>>());
}  // namespace loan
