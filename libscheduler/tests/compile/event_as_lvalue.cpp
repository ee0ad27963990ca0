// An event may carry resources: it is consumed too.
// error: an event is consumed; pass an rvalue
#include "tokenrelay/scheduler/request_table.hpp"
using namespace tokenrelay::scheduler;
bool stop(fsm::Slot<RequestFsm>& slot, Resources& resources) {
#ifdef MUST_NOT_COMPILE
  request::Abort event{resources};
  return fsm::dispatch<RequestFsm>(slot, event).has_value();
#else
  return fsm::dispatch<RequestFsm>(slot, request::Abort{resources}).has_value();
#endif
}
