// What is due is what the table refuses.
// error: law 3: a state that holds blocks needs a deadline, a duty that the table accepts
#include "loan.hpp"
namespace loan {
struct Reading {
  static constexpr std::string_view name = "Read";
#ifdef MUST_NOT_COMPILE
  static constexpr StateFacts facts{Party::owner, true, Deadline::answer, "Take", Party::owner};
#else
  static constexpr StateFacts facts = Read::facts;
#endif
};
static_assert(lawful<Loan<rows, Reading>>());
}  // namespace loan
